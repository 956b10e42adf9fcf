"""Document boundaries of packed rows, for operators and the fla kernels.

`documents` is `[B, T]` integers, non-decreasing along T; a token sees only tokens with its own number.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_map

Pair = tuple[torch.Tensor, torch.Tensor]


def _remembered(function: Callable[[torch.Tensor], Pair]) -> Callable[[torch.Tensor], Pair]:
    """`function` of documents with its last answer kept, for all layers ask about the same tensor.

    An edit in place is noticed, one through `.data` or numpy is not. Nothing is kept where operations are recorded to
    be run again with other values, nor of inference tensors, which count no edits and cannot be saved for a backward.
    """
    last: tuple[torch.Tensor, int, Pair] | None = None

    @functools.wraps(function)
    def remembering(documents: torch.Tensor) -> Pair:
        nonlocal last
        if _recorded() or documents.is_inference() or torch.is_inference_mode_enabled():
            return function(documents)
        kept = last  # which another thread may replace
        if kept is None or kept[0] is not documents or kept[1] != documents._version:
            last = kept = documents, documents._version, function(documents)
        return kept[2]

    return remembering


def _recorded() -> bool:
    """Whether operations are compiled, traced or captured."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None:
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def fill_padding(documents: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Gives right-padding the document of the row's last real token, whatever number it carried. `[B, T]`"""
    if mask is None:
        return documents
    lowest = torch.iinfo(documents.dtype).min
    return torch.where(mask, documents, lowest).cummax(dim=1).values


@_remembered
def positions(documents: torch.Tensor) -> Pair:
    """Where each token's document starts in its row, and the token's position in it; both `[B, T]`."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    start = torch.where(is_first, index, 0).cummax(dim=1).values
    return start, index - start


@_remembered
def cumulative_lengths(documents: torch.Tensor) -> Pair:
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


class Layout(NamedTuple):
    """Where `unpack` put each document: one entry per group of rows."""

    shape: torch.Size
    row: list[torch.Tensor]
    """Row of the packed batch that each unpacked row came from, `[R]`."""
    source: list[torch.Tensor]
    """Column of the packed row that each unpacked token came from, `[R, L]`, clamped beyond the document."""
    real: list[torch.Tensor]
    """Which unpacked tokens exist, `[R, L]`."""
    last: list[torch.Tensor]
    """Which unpacked rows are the last document of their packed row, `[R]`."""


def unpack(
    inputs: Sequence[torch.Tensor | None], documents: torch.Tensor, neutral: Sequence[float] = ()
) -> tuple[list[list[torch.Tensor | None]], Layout]:
    """Gives each document a row of its own, for recurrences that cannot forget in the middle of a row.

    inputs `[B, T, ...]`: q, k, v and gates. Rows are grouped by length to the next power of two, so that at most
    half of what is computed is padding; padding holds 0, and in the gates what `neutral` says.
    """
    length = documents.shape[1]
    _, position = positions(documents)
    first = (position == 0).nonzero()  # [R, 2]: row, column
    ends = torch.cat([first[1:, 1], first.new_tensor([length])])
    ends = torch.where(ends == 0, length, ends)
    sizes = ends - first[:, 1]
    is_last = ends == length
    classes = torch.ceil(torch.log2(sizes.double())).long()
    layout = Layout(documents.shape, [], [], [], [])
    rows: list[list[torch.Tensor | None]] = []
    fill = [0.0, 0.0, 0.0, *neutral] if neutral else [0.0] * len(inputs)
    for size_class in classes.unique().tolist():
        chosen = classes == size_class
        row, begin, size = first[chosen, 0], first[chosen, 1], sizes[chosen]
        index = torch.arange(int(size.max()), device=documents.device)
        real, source = index < size[:, None], (begin[:, None] + index).clamp(max=length - 1)
        for kept, value in zip(layout[1:], (row, source, real, is_last[chosen]), strict=True):
            kept.append(value)
        rows.append(
            [
                None
                if x is None
                else torch.where(real.reshape(*real.shape, *[1] * (x.dim() - 2)), x[row[:, None], source], value)
                for x, value in zip(inputs, fill, strict=True)
            ]
        )
    return rows, layout


def repack(results: Sequence[tuple[Any, Any]], layout: Layout) -> tuple[Any, Any]:
    """Outputs of the unpacked rows, `[R, L, ...]` each, back in their places, and the states of the last documents."""

    def outputs(*parts: torch.Tensor) -> torch.Tensor:
        packed = parts[0].new_zeros(*layout.shape, *parts[0].shape[2:])
        for part, row, source, real in zip(parts, layout.row, layout.source, layout.real, strict=True):
            packed = packed.index_put((row[:, None].expand_as(source)[real], source[real]), part[real])
        return packed

    def states(*parts: torch.Tensor) -> torch.Tensor:
        kept = torch.cat([part[last] for part, last in zip(parts, layout.last, strict=True)])
        rows = torch.cat([row[last] for row, last in zip(layout.row, layout.last, strict=True)])
        return kept[rows.argsort()]

    outs, after = zip(*results, strict=True)
    return tree_map(outputs, outs[0], *outs[1:]), tree_map(states, after[0], *after[1:])
