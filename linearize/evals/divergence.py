"""How far a student's predictions are from its teacher's on held-out text: KL(teacher || student) per token.

A loss says how well a model predicts the text; this says how well it is the other model, which distillation is about.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from linearize.evals.text import LOGIT_BUDGET, evaluating, windows_of


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
    """Compare a student with its teacher; arguments and errors are those of `divergence_by_position`."""
    kl, same = divergence_by_position(model, teacher, token_ids, length=length, windows=windows, batch_size=batch_size)
    return Divergence(length, float(kl.mean()), float(same.mean()))


def divergence_by_position(
    model: Any,
    teacher: Callable[[], AbstractContextManager[Any]],
    token_ids: torch.Tensor,
    *,
    length: int,
    windows: int | None = None,
    batch_size: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher || student) of the prediction at each position in nats, and the share of windows in which both find
    the same token likeliest: [length - 1] float64 each.

    The windows are those of `linearize.evals.text.loss_on_text`, whose arguments and errors these are.

    Args:
        teacher: `with teacher() as source:` is the model to compare with, which may be `model` in another state.
    """
    kl, same = torch.zeros(length - 1, dtype=torch.float64), torch.zeros(length - 1, dtype=torch.float64)
    count = 0
    with evaluating(model):
        for ids in windows_of(token_ids, length, windows, batch_size, model.device):
            with teacher() as source:
                expected = source(input_ids=ids.to(source.device), use_cache=False).logits[:, :-1].to(model.device)
            found = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
            step = max(1, LOGIT_BUDGET // (found.shape[0] * found.shape[-1]))
            for i in range(0, length - 1, step):
                at = slice(i, i + step)
                log_t, log_s = (x[:, at].float().log_softmax(-1) for x in (expected, found))
                apart = (log_t.exp() * (log_t - log_s)).sum(-1).double()
                alike = (log_t.argmax(-1) == log_s.argmax(-1)).double()
                kl[at] += apart.sum(0).cpu()
                same[at] += alike.where(~apart.isnan(), torch.nan).sum(0).cpu()  # of NaN the first is the largest
            count += len(ids)
    return kl / count, same / count
