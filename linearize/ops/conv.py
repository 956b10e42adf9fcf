"""Causal depthwise convolution over a few tokens, with padding, packed documents and a state of constant size."""

import torch

from linearize.ops.documents import fill_padding, positions
from linearize.ops.layout import zero_padding
from linearize.ops.window_state import last_tokens


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = sum_j weight[..., size - 1 - j] * x_{t-j}, j = 0 .. size - 1, per channel.

    x `[B, T, ...]`, weight `[..., size]` with the current token's tap last; mask `[B, T]` bool, real tokens first in
    each row; documents `[B, T]` int, non-decreasing; state as returned.
    Returns y `[B, T, ...]` and the state `[B, size - 1, ...]`, the last tokens of the row (of its last document).
    Raises ValueError for documents with a state.
    """
    if documents is not None and state is not None:
        raise ValueError("causal_conv: documents cannot be combined with an incoming state; pass state=None")
    size, T = weight.shape[-1], x.shape[1]
    x = zero_padding(x, mask)
    ring = x.new_zeros(x.shape[0], size - 1, *x.shape[2:]) if state is None else state.to(x.dtype)
    joined = torch.cat([ring, x], dim=1)
    place = None if documents is None else positions(documents)[1].reshape(*x.shape[:2], *[1] * (x.dim() - 2))
    y = x * weight[..., -1]
    for back in range(1, size):
        earlier = joined[:, size - 1 - back : size - 1 - back + T]
        if place is not None:
            earlier = torch.where(place >= back, earlier, 0)
        y = y + earlier * weight[..., size - 1 - back]
    if documents is not None:
        filled = fill_padding(documents, mask)
        x = zero_padding(x, filled == filled[:, -1:])
    return y, last_tokens(x, ring, mask)
