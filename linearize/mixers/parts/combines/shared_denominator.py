"""One softmax-like normalisation over both branches: LoLCATs (Zhang et al. 2024, arXiv:2410.10254), equation 6.

    y_t = (f sum_win exp(s_ti - c_t) v_i + sum_before phi(q_t).phi(k_i) v_i) / (the same with v_i -> 1)

f = sigmoid(w) per head, c_t the largest score in the window. The recurrent branch holds the tokens that left the
window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from linearize.inits.base import Constant, Init
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.combines.base import Combine, Memory, Window


@dataclass(frozen=True)
class SharedDenominatorConfig(PartConfig):
    """Settings of the shared denominator."""

    type: str = "shared_denominator"
    window_factor: float = 0.1
    """First value of f, the weight of the window against the recurrent branch; between 0 and 1."""

    def __post_init__(self) -> None:
        if not 0 < self.window_factor < 1:
            raise ValueError(f"combine.window_factor must lie between 0 and 1, got {self.window_factor}")


class SharedDenominator(Combine):
    """See the module docstring."""

    Config = SharedDenominatorConfig
    shares_denominator = True

    def __init__(self, config: SharedDenominatorConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.window_factor = nn.Parameter(torch.empty(shape.heads))

    def inits(self) -> dict[str, Init]:
        factor = self.config.window_factor
        return {"window_factor": Constant(math.log(factor / (1 - factor)))}

    def window_weight(self, window: Window, memory: Memory, x: torch.Tensor) -> torch.Tensor:
        assert memory.den is not None
        weight = self._unnormalised(window)
        return weight / (weight + memory.den)

    def _unnormalised(self, window: Window) -> torch.Tensor:
        """[B, T, Hq] the window's part of the denominator."""
        return self.window_factor.to(window.lse.dtype).sigmoid() * (window.lse - window.peak).exp()

    def forward(self, window: Window, memory: Memory, x: torch.Tensor) -> torch.Tensor:
        assert memory.den is not None
        weight = self._unnormalised(window)
        return (weight[..., None] * window.out + memory.out) / (weight + memory.den)[..., None]
