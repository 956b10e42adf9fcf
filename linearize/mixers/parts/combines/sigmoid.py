"""y = m window + (1 - m) recurrent, m = sigmoid(x W + b) per head and token: xLSTM distillation (2026,
arXiv:2603.15590).

W starts at zero, so that the mix is a constant at first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from linearize.inits.base import Constant, Init
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.combines.base import Combine, Memory, Window
from linearize.ops.layout import working_dtype


@dataclass(frozen=True)
class SigmoidConfig(PartConfig):
    """Settings of the learned mix."""

    type: str = "sigmoid"
    mix: float = 0.9
    """First weight of the window, between 0 and 1."""

    def __post_init__(self) -> None:
        if not 0 < self.mix < 1:
            raise ValueError(f"combine.mix must lie between 0 and 1, got {self.mix}")


class Sigmoid(Combine):
    """See the module docstring."""

    Config = SigmoidConfig

    def __init__(self, config: SigmoidConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.weight = nn.Parameter(torch.empty(shape.heads, shape.hidden_size))
        self.bias = nn.Parameter(torch.empty(shape.heads))

    def inits(self) -> dict[str, Init]:
        mix = self.config.mix
        return {"weight": Constant(0.0), "bias": Constant(math.log(mix / (1 - mix)))}

    def window_weight(self, window: Window, memory: Memory, x: torch.Tensor) -> torch.Tensor:
        z = F.linear(x, self.weight.to(x.dtype))
        return (z.to(working_dtype(z)) + self.bias).sigmoid()

    def forward(self, window: Window, memory: Memory, x: torch.Tensor) -> torch.Tensor:
        mix = self.window_weight(window, memory, x).unsqueeze(-1)
        return mix * window.out + (1 - mix) * memory.out
