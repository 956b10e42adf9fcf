"""How far a student's predictions are from its teacher's on held-out text: KL(teacher || student) per token.

A loss says how well a model predicts the text; this says how well it is the other model, which distillation is about.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from linearize.evals.text import LOGIT_BUDGET, evaluating, spread_windows
from linearize.losses import divergence


@dataclass(frozen=True)
class Divergence:
    """Means over all predicted tokens of windows of one length."""

    length: int
    """Tokens per window."""
    kl: float
    """KL(teacher || student) over the whole vocabulary, nats per predicted token."""
    same: float
    """Share of positions at which both find the same token likeliest."""


def divergence_on_text(
    model: Any,
    teacher: Callable[[], AbstractContextManager[Any]],
    token_ids: torch.Tensor,
    *,
    length: int,
    windows: int | None = None,
    batch_size: int = 4,
) -> Divergence:
    """Compare a student with its teacher.

    The windows are those of `linearize.evals.text.loss_on_text`, whose arguments and errors these are.

    Args:
        teacher: `with teacher() as source:` is the model to compare with, which may be `model` in another state.
    """
    starts = spread_windows(len(token_ids), length, windows)
    kl, same, count = 0.0, 0, 0
    with evaluating(model):
        for first in range(0, len(starts), batch_size):
            rows = [token_ids[start : start + length] for start in starts[first : first + batch_size]]
            ids = torch.stack(rows).to(model.device)
            with teacher() as source:
                expected = source(input_ids=ids.to(source.device), use_cache=False).logits[:, :-1].flatten(0, 1)
                expected = expected.to(model.device)
            student = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            step = max(1, LOGIT_BUDGET // student.shape[-1])
            for s, t in zip(student.split(step), expected.split(step), strict=True):
                kl += float(divergence(s, t, "forward"))
                same += int((s.argmax(-1) == t.argmax(-1)).sum())
            count += len(student)
    return Divergence(length, kl / count, same / count)
