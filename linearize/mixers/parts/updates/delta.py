"""S_t = (I - beta_t k_t k_t^T) D_t S_{t-1} + beta_t k_t v_t^T: a token replaces what its key held before.

Without a decay it is DeltaNet (Yang et al. 2024, arXiv:2406.06484), with one per head Gated DeltaNet
(arXiv:2412.06464), with one per channel KDA (Kimi Linear, arXiv:2510.26692). Queries and keys are brought to length 1,
without which the state can grow without bound; beta = sigmoid(x W + b) per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.decays.base import Gate
from linearize.mixers.parts.updates.base import Operands, Update, WriteStrength, unit, write_scaled
from linearize.ops.delta import delta_rule


@dataclass(frozen=True)
class DeltaConfig(PartConfig):
    """Settings of the delta rule."""

    type: str = "delta"
    beta: float = 0.5
    """First write strength, between 0 and its limit."""
    negative: bool = False
    """Whether beta may reach 2, which lets a token flip what its key held (Grazzi et al. 2024, arXiv:2411.12537)."""
    bias: bool = True
    """Whether beta has a bias; without one it starts at half its limit, and the calibrated init leaves it there."""

    def __post_init__(self) -> None:
        limit = 2 if self.negative else 1
        if not self.bias and self.beta != limit / 2:
            raise ValueError(
                f"update.beta cannot start at {self.beta} without a bias; set it to {limit / 2}, or update.bias to true"
            )
        if not 0 < self.beta < limit:
            raise ValueError(f"update.beta must lie between 0 and {limit}, got {self.beta}")


class Delta(Update):
    """See the module docstring. State: S [B, Hq, F, V]."""

    Config = DeltaConfig
    title = "delta rule"
    titled_without_decay = True
    decays = ("none", "head", "channel")

    def __init__(self, config: DeltaConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.beta = WriteStrength(shape, config.beta, 2.0 if config.negative else 1.0, config.bias)

    def operands(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: Gate, x: torch.Tensor) -> Operands:
        return Operands(delta_rule, unit(q), unit(k), write_scaled(v, gate), (gate.log_decay, self.beta(x)))
