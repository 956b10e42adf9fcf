"""Document boundaries of packed rows: which token may see which, for chunked operators and the fla kernels.

`documents` is `[B, T]` integers, non-decreasing along T; a token sees only tokens with its own number.
"""

from typing import NamedTuple

import torch


def fill_padding(documents: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Gives right-padding the document of the row's last real token, whatever number it carried. `[B, T]`"""
    if mask is None:
        return documents
    lowest = torch.iinfo(documents.dtype).min
    return torch.where(mask, documents, lowest).cummax(dim=1).values


def positions(documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each token's document starts in its row, and the token's position in it; both `[B, T]`."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    start = torch.where(is_first, index, 0).cummax(dim=1).values
    return start, index - start


class ChunkVisibility(NamedTuple):
    """What documents allow in a row cut into N chunks of c tokens (bool).

    pair  `[B, 1, N, c, c]`  query i and key j of the same chunk share a document
    read  `[B, 1, N, c, 1]`  query i belongs to the document of the state carried into its chunk
    keep  `[B, 1, N, c, 1]`  key j belongs to the document of the chunk's last query and enters the state
    carry `[B, 1, N, 1, 1]`  the state carried into the chunk survives it
    """

    pair: torch.Tensor
    read: torch.Tensor
    keep: torch.Tensor
    carry: torch.Tensor


def chunk_visibility(documents: torch.Tensor, key_documents: torch.Tensor, chunk_size: int) -> ChunkVisibility:
    """Visibility between the chunks of `documents` (queries) and `key_documents`, both `[B, N * chunk_size]`.

    Key documents may lag behind (`key_documents <= documents`): a key of an earlier document is then seen by
    nobody from its position on, which is why the carried state needs the keys of one document only.
    """
    query = documents.unflatten(1, (-1, chunk_size))[:, None]
    key = key_documents.unflatten(1, (-1, chunk_size))[:, None]
    last = query[..., -1:]
    # The carried state belongs to the last query of the chunk before; nothing precedes the first chunk.
    before = torch.cat([query[:, :, :1, :1], last[:, :, :-1]], dim=2)
    return ChunkVisibility(
        pair=query[..., :, None] == key[..., None, :],
        read=(query == before)[..., None],
        keep=(key == last)[..., None],
        carry=(last == before)[..., None],
    )


def cumulative_lengths(documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Boundaries of all documents of all rows laid end to end, for kernels that take `cu_seqlens`.

    Returns `cu_seqlens` `[N + 1]` over the B * T tokens of the flattened rows, and `[B]` the index of the
    last document of each row. Synchronises with the device, because N is data.
    """
    batch, length = documents.shape
    _, position = positions(documents)
    starts = (position.flatten() == 0).nonzero().flatten()
    cu_seqlens = torch.cat([starts, starts.new_tensor([batch * length])])
    last = (position == 0).sum(dim=1).cumsum(dim=0) - 1
    return cu_seqlens, last
