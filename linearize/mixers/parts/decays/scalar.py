"""g = -exp(A) dt, dt = softplus(x W + bias), one per head and token: Mamba-2 (arXiv:2405.21060) and Gated DeltaNet
(2412.06464).

With `write: true` a token is also written with weight dt, as Mamba-2's discretisation has it (Dao & Gu 2024, section
6). W starts at zero, so the decay is the bias's at first and every gradient flows; A starts at 0. Half-lives are those
of the first values, ln 2 / dt (Taylor-Calibrate, arXiv:2606.16429).
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
from linearize.mixers.parts.decays.base import Gate, GatedDecay, check_half_life, inverse_softplus
from linearize.ops.layout import working_dtype


@dataclass(frozen=True)
class ScalarConfig(PartConfig):
    """Settings of the scalar data-dependent decay."""

    type: str = "scalar"
    half_life: tuple[float, float] = (32.0, 1024.0)
    """First half-lives in tokens of the first and the last head."""
    write: bool = False
    """Whether dt also scales what is written."""

    def __post_init__(self) -> None:
        check_half_life(self.half_life)


class Scalar(GatedDecay):
    """See the module docstring."""

    Config = ScalarConfig
    granularity = "head"

    def __init__(self, config: ScalarConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.weight = nn.Parameter(torch.empty(shape.heads, shape.hidden_size))
        self.bias = nn.Parameter(torch.empty(shape.heads))
        self.log_rate = nn.Parameter(torch.empty(shape.heads))

    def inits(self) -> dict[str, Init]:
        return {"weight": Constant(0.0), "bias": self.bias_init(), "log_rate": Constant(0.0)}

    @staticmethod
    def offset(log_decay: torch.Tensor, config: Any) -> torch.Tensor:
        return inverse_softplus(-log_decay)

    def forward(self, x: torch.Tensor, k: torch.Tensor) -> Gate:
        z = F.linear(x, self.weight.to(x.dtype))
        z = z.to(working_dtype(z))
        dt = F.softplus(z + self.bias)
        return Gate(-self.log_rate.to(dt.dtype).exp() * dt, dt if self.config.write else None)
