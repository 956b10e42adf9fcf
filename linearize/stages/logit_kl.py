"""Distillation of predictions: pull the student's distribution over the next token towards the source model's.

    L = (1 - ce) tau^2 KL(p_teacher^(1/tau) || p_student^(1/tau)) + ce CE

summed over all positions that predict something and divided by their number: Hinton et al. 2015 (arXiv:1503.02531).
`divergence: reverse` is MiniLLM's direction (Gu et al. 2023, arXiv:2306.08543), `jensen_shannon` the mean of the two
against their mixture (GKD, Agarwal et al. 2023, arXiv:2306.13649). The teacher is the source model inside the converted
one: only tensors that training changes are held twice.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from linearize.losses import divergence, next_token
from linearize.stages.tuning.tuned import Tuned, TunedConfig
from linearize.training.loop import Batch, Metrics


class LogitKLConfig(TunedConfig):
    """Settings of the logit_kl stage."""

    type: Literal["logit_kl"] = "logit_kl"
    temperature: float = Field(1.0, gt=0, description="tau: both distributions' logits are divided by it.")
    divergence: Literal["forward", "reverse", "jensen_shannon"] = Field(
        "forward", description="forward: KL(teacher || student)."
    )
    top_k: int | None = Field(
        None,
        gt=0,
        description="Compare the teacher's k likeliest tokens and all others as one; null for the whole vocabulary.",
    )
    ce: float = Field(0.0, ge=0, lt=1, description="Weight of the next-token cross-entropy; KL has the rest.")


class LogitKL(Tuned):
    """See the module docstring."""

    Config = LogitKLConfig
    needs_teacher = True
    config: LogitKLConfig

    def backward(self, model: Any, batch: Batch, weight: float) -> Metrics:
        config = self.config
        with self.teacher(model):
            expected, _ = self.hidden(model, batch)
        hidden, targets = self.hidden(model, batch)

        def loss(hidden: torch.Tensor, expected: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            student = self.family.logits(model, hidden)
            with self.teacher(model):
                teacher = self.family.logits(model, expected)
            kl = divergence(student, teacher, config.divergence, config.temperature, config.top_k)
            return torch.stack([kl, next_token(student, targets)])

        kl, ce = self.scored(loss, hidden, expected, targets)
        total = (1 - config.ce) * kl + config.ce * ce
        (total * weight).backward()
        return {"loss": total.detach(), "kl": kl.detach(), "ce": ce.detach()}
