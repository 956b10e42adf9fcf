"""Causal depthwise convolution over a few tokens, with padding, packed documents and a state of constant size."""

import torch

from linearize.ops.backend import choose, fla_function
from linearize.ops.documents import cumulative_lengths, fill_padding, positions
from linearize.ops.layout import zero_padding
from linearize.ops.window_state import last_tokens

KERNEL_TAPS = 8
"""Most taps that go to fla's kernel, whose loops over them are unrolled when it is compiled."""


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = sum_j weight[..., size - 1 - j] * x_{t-j}, j = 0 .. size - 1, per channel.

    x `[B, T, ...]`, weight `[..., size]` with the current token's tap last; mask `[B, T]` bool, real tokens first in
    each row; documents `[B, T]` int, non-decreasing; state as returned.
    backend: a fla kernel runs up to 8 taps on rows that start here; what has more or goes on from a state, torch.
    Returns y `[B, T, ...]` and the state `[B, size - 1, ...]`, the last tokens of the row (of its last document).
    Raises ValueError for documents with a state, or a backend that cannot be met.
    """
    if documents is not None and state is not None:
        raise ValueError("causal_conv: documents cannot be combined with an incoming state; pass state=None")
    size = weight.shape[-1]
    x = zero_padding(x, mask)
    ring = x.new_zeros(x.shape[0], size - 1, *x.shape[2:]) if state is None else state.to(x.dtype)
    filled = None if documents is None else fill_padding(documents, mask)
    if state is None and size <= KERNEL_TAPS and choose("causal_conv", backend, x) == "fla":
        y = _kernel(x, weight, filled)
    else:
        y = _by_taps(x, weight, torch.cat([ring, x], dim=1), filled)
    if filled is not None:
        x = zero_padding(x, filled == filled[:, -1:])
    return y, last_tokens(x, ring, mask)


def _by_taps(
    x: torch.Tensor, weight: torch.Tensor, joined: torch.Tensor, documents: torch.Tensor | None
) -> torch.Tensor:
    """The sum of x `[B, T, ...]`, and of what is up to size - 1 places before it in joined `[B, size - 1 + T, ...]`."""
    size, T, taps = weight.shape[-1], x.shape[1], weight.unbind(-1)
    place = None if documents is None else positions(documents)[1].reshape(*x.shape[:2], *[1] * (x.dim() - 2))
    y = x * taps[-1]
    for back in range(1, size):
        earlier = joined[:, size - 1 - back : size - 1 - back + T]
        if place is not None:
            earlier = torch.where(place >= back, earlier, 0)
        y = y + earlier * taps[size - 1 - back]
    return y


def _kernel(x: torch.Tensor, weight: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    """fla's causal_conv1d, which takes `[B, T, D]`; documents become `cu_seqlens` over the rows laid end to end."""
    causal_conv1d = fla_function("causal_conv", "fla.modules.causal_conv1d", "causal_conv1d")
    flat, taps = x.flatten(2), weight.flatten(0, -2)
    if documents is None:
        return causal_conv1d(flat, taps)[0].view(x.shape)
    lengths, _ = cumulative_lengths(documents)
    return causal_conv1d(flat.flatten(0, 1).unsqueeze(0), taps, cu_seqlens=lengths)[0].view(x.shape)
