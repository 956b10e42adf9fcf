"""g = logsigmoid(x W + bias), one per head and token: the forget gate of LSTMs, as in xLSTM (Beck et al. 2024,
arXiv:2405.04517).

W starts at zero, so that the decay is the bias's at first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from linearize.inits.base import Constant, Init
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.decays.base import Gate, GatedDecay, check_half_life, inverse_logsigmoid
from linearize.ops.layout import working_dtype


@dataclass(frozen=True)
class SigmoidConfig(PartConfig):
    """Settings of the sigmoid forget gate."""

    type: str = "sigmoid"
    half_life: tuple[float, float] = (32.0, 1024.0)
    """First half-lives in tokens of the first and the last head."""

    def __post_init__(self) -> None:
        check_half_life(self.half_life)


class Sigmoid(GatedDecay):
    """See the module docstring."""

    Config = SigmoidConfig
    granularity = "head"

    def __init__(self, config: SigmoidConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.weight = nn.Parameter(torch.empty(shape.heads, shape.hidden_size))
        self.bias = nn.Parameter(torch.empty(shape.heads))

    def inits(self) -> dict[str, Init]:
        return {"weight": Constant(0.0), "bias": self.bias_init()}

    @staticmethod
    def offset(log_decay: torch.Tensor, config: Any) -> torch.Tensor:
        return inverse_logsigmoid(log_decay)

    def forward(self, x: torch.Tensor, k: torch.Tensor) -> Gate:
        z = F.linear(x, self.weight.to(x.dtype))
        return Gate(F.logsigmoid(z.to(working_dtype(z)) + self.bias))
