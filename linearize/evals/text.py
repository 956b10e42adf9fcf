"""Loss on held-out text, by context length and by position, with all branches of the mixers or without one.

`loss_on_text(model, token_ids, length=2048)` scores windows of one token stream (see
`linearize.data.read_tokens`), and `branch_losses` repeats it with each branch switched off. Both always score
the same windows of the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from linearize.errors import UserError
from linearize.mixers.base import branch_off, branches_of
from linearize.progress import advance
from linearize.swap import swapped

LOGIT_BUDGET = 2**25
"""Float32 logits held at once while the loss is taken (128 MiB)."""


@dataclass(frozen=True)
class TextLoss:
    """Mean next-token loss over windows of one length."""

    length: int
    """Tokens per window, T; each window predicts its last T - 1 tokens."""
    loss: float
    """Nats per predicted token."""
    tokens: int
    """Predicted tokens."""
    windows: int
    by_position: tuple[tuple[int, int, float], ...]
    """(first, end, loss): mean loss of the tokens at positions first <= p < end of a window; ends double."""


@dataclass(frozen=True)
class BranchLoss:
    """Loss with one branch of every mixer switched off."""

    branch: str
    length: int
    loss: float
    """Nats per predicted token."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def spread_windows(tokens: int, length: int, windows: int | None) -> list[int]:
    """Where windows begin: all non-overlapping ones, or `windows` of them, evenly spread over the text.

    Raises:
        UserError: when the text is shorter than one window.
    """
    available = tokens // length
    if available == 0:
        raise UserError(
            f"the evaluation text has {tokens} tokens, fewer than one window of {length}; choose shorter "
            "`lengths` or a longer text"
        )
    count = available if windows is None else min(windows, available)
    return [(i * available // count) * length for i in range(count)]


def windows_of(
    token_ids: torch.Tensor, length: int, windows: int | None, rows: int, device: torch.device | str
) -> Iterator[torch.Tensor]:
    """The windows of `spread_windows`, whose errors these are: [B, length], at most `rows` at once, on `device`."""
    starts = spread_windows(len(token_ids), length, windows)
    for first in range(0, len(starts), rows):
        batch = torch.stack([token_ids[start : start + length] for start in starts[first : first + rows]])
        yield batch.to(device)
        advance(batch.numel())


def loss_on_text(
    model: Any,
    token_ids: torch.Tensor,
    *,
    length: int,
    windows: int | None = None,
    batch_size: int = 4,
    device: torch.device | str | None = None,
) -> TextLoss:
    """Mean loss over non-overlapping windows of `length` tokens.

    Args:
        model: a causal LM; put into evaluation mode meanwhile.
        token_ids: [N] the text, documents joined by the end-of-text token.
        length: tokens per window, at least 2.
        windows: score this many, evenly spaced over the text; all that fit when None.
        batch_size: windows per forward; changes speed and memory, not the result.
        device: where the model is; its own device when None.

    Raises:
        UserError: when the text is shorter than one window.
    """
    if length < 2:
        raise UserError(f"cannot score windows of {length} token(s): `length` must be at least 2")
    device = device or next(model.parameters()).device
    totals, count = torch.zeros(length - 1, dtype=torch.float64), 0
    with evaluating(model):
        for ids in windows_of(token_ids, length, windows, batch_size, device):
            totals += position_losses(model, ids).double().sum(0).cpu()
            count += len(ids)
    edges = doubling_edges(length)
    buckets = ((a, b, float(totals[a - 1 : b - 1].mean() / count)) for a, b in pairwise(edges))
    return TextLoss(
        length=length,
        loss=float(totals.mean() / count),
        tokens=count * (length - 1),
        windows=count,
        by_position=tuple(buckets),
    )


def branch_losses(
    model: Any,
    token_ids: torch.Tensor,
    *,
    lengths: Sequence[int],
    windows: int | None = None,
    batch_size: int = 4,
    device: torch.device | str | None = None,
) -> list[BranchLoss]:
    """`loss_on_text` with each branch of the mixers switched off in turn, at each length.

    Empty for a model without branches, and inside `linearize.swap.teacher_path`, where no mixer runs.
    """
    if any(layer.teacher for layer in swapped(model).values()):
        return []
    losses = []
    for branch in branches_of(model):
        for length in lengths:
            with branch_off(model, branch):
                score = loss_on_text(
                    model, token_ids, length=length, windows=windows, batch_size=batch_size, device=device
                )
            losses.append(BranchLoss(branch, length, score.loss))
    return losses


def position_losses(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Loss of each predicted token: [B, T] -> [B, T - 1] float32; few logits are float32 at once."""
    logits = model(input_ids=input_ids, use_cache=False).logits  # [B, T, V] in the model's dtype
    targets = input_ids[:, 1:]
    rows, tokens, vocabulary = logits.shape
    step = max(1, LOGIT_BUDGET // (rows * vocabulary))
    parts = [
        F.cross_entropy(
            logits[:, i : min(i + step, tokens - 1)].float().flatten(0, 1),
            targets[:, i : i + step].flatten(),
            reduction="none",
        ).view(rows, -1)
        for i in range(0, tokens - 1, step)
    ]
    return torch.cat(parts, dim=1)


def doubling_edges(length: int) -> list[int]:
    """Bucket borders for positions 1 .. length - 1: 1, 64, 128, 256, ... and `length`."""
    edges, edge = [1], 64
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]
