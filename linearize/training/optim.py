"""AdamW groups and learning-rate schedules, as functions of the step so that a resumed run continues exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from linearize.training.config import TrainingConfig


def adamw(groups: list[dict], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over parameter groups; each group carries `lr_scale`, its factor on the scheduled learning rate."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def decay(config: TrainingConfig, step: int, steps: int) -> float:
    """Factor on lr at `step` of `steps` (0-based): warm-up, then the schedule. The plateau factor comes on top.

    With w = round(warmup * steps), r = min_lr_ratio and d = (step - w) / (steps - w):

        (step + 1) / (w + 1)              in the warm-up, step < w
        r + (1 - r) (1 + cos(pi d)) / 2   cosine
        r + (1 - r) (1 - d)               linear

    d is 1 where training ends, at `step == steps`, so the last step is still just above r. That is how transformers'
    `get_cosine_with_min_lr_schedule_with_warmup` and torch's `CosineAnnealingLR` count: published settings carry over.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule in {"constant", "plateau"}:
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


class Average:
    """Exponential moving average of parameters (Tarvainen & Valpola 2017, arXiv:1703.01780): m = d m + (1 - d) p.

    d is `decay`, or (1 + n) / (10 + n) at step n where that is less, so that the first values are soon gone.
    """

    def __init__(self, decay: float, parameters: Mapping[str, torch.Tensor]):
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int, parameters: Mapping[str, torch.Tensor]) -> None:
        """Take the parameters after optimiser step `step`, from 0."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in parameters.values()], share)

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Set the parameters to their averages."""
        for name, p in parameters.items():
            p.copy_(self.values[name])


@dataclass
class Plateau:
    """Factor on lr that falls when a loss does not, as torch's `ReduceLROnPlateau` on means over `window` steps.

    A mean is new best when it is below (1 - 1e-4) times the best before. After more than `patience` others in a row
    `factor` is multiplied by 0.1, down to `least`, and the count begins again.
    """

    window: int
    patience: int
    least: float = 0.0
    factor: float = 1.0
    best: float = math.inf
    bad: int = 0
    losses: list[float] = field(default_factory=list)

    def update(self, loss: float) -> None:
        """Take one step's loss."""
        self.losses.append(loss)
        if len(self.losses) < self.window:
            return
        mean = sum(self.losses) / len(self.losses)
        self.losses = []
        if mean < self.best * (1 - 1e-4):
            self.best, self.bad = mean, 0
        else:
            self.bad += 1
        if self.bad > self.patience:
            self.factor, self.bad = max(self.least, 0.1 * self.factor), 0
