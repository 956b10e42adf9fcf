"""The past in buckets of growing size, each with a state and a learned weight: log-linear attention.

    y_t = sum_l lambda_t^l q_t S_t^l,    lambda = softplus(x W + b) per head and level

Guo et al. 2025 (arXiv:2506.04761), section 3, on the additive update (as in Mamba-2) or the delta rule (as in Gated
DeltaNet). A state per level makes the decoding state `levels` times as large; the last level takes everything beyond
2^(levels - 2) tokens. All lambdas start at 1, where it is the update without levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from linearize.inits.base import Constant, Init
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.decays.base import Gate
from linearize.mixers.parts.updates.base import Operands, Update, WriteStrength, unit, write_scaled
from linearize.ops.layout import working_dtype
from linearize.ops.log_linear import log_linear


@dataclass(frozen=True)
class LogLinearConfig(PartConfig):
    """Settings of the log-linear update."""

    type: str = "log_linear"
    rule: Literal["additive", "delta"] = "additive"
    """How a token is written: added, or by the delta rule."""
    levels: int = 12
    """Buckets; those of 1024 tokens and more share the last of 12."""
    beta: float = 0.5
    """First write strength of the delta rule."""

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 48:
            raise ValueError(f"update.levels must lie between 2 and 48, got {self.levels}")
        if not 0 < self.beta < 1:
            raise ValueError(f"update.beta must lie between 0 and 1, got {self.beta}")


class LogLinear(Update):
    """See the module docstring. State: S [B, Hq, L, F, V] and the number of tokens seen [B]."""

    Config = LogLinearConfig
    title = "log-linear attention"
    routable = False
    decays = ("none", "head")

    def __init__(self, config: LogLinearConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.weight = nn.Parameter(torch.empty(shape.heads, config.levels, shape.hidden_size))
        self.bias = nn.Parameter(torch.empty(shape.heads, config.levels))
        if config.rule == "delta":
            self.beta = WriteStrength(shape, config.beta)

    def inits(self) -> dict[str, Init]:
        one = Constant(math.log(math.e - 1))  # softplus of it is 1
        return {"weight": Constant(0.0), "bias": one, **super().inits()}

    def matrices(self, state: Any) -> tuple[torch.Tensor, ...]:
        return (state[0].flatten(1, 2),)

    def operands(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: Gate, x: torch.Tensor) -> Operands:
        z = torch.einsum("btc,hlc->bthl", x, self.weight.to(x.dtype))
        levels = F.softplus(z.to(working_dtype(z)) + self.bias)
        beta = None
        if self.config.rule == "delta":
            q, k, beta = unit(q), unit(k), self.beta(x)
        return Operands(log_linear, q, k, write_scaled(v, gate), (gate.log_decay, levels, beta))
