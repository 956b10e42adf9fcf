"""A decay per channel with a second gate that keeps the first from saturating: ReGLA (Lu et al. 2025,
arXiv:2502.01578).

    f = sigmoid(z)    r = sigmoid(z_r)    decay = (1 - r) f^2 + r (1 - (1 - f)^2)

Section 3.3, after Gu et al. 2020 (arXiv:1910.09890): where f is near 0 or 1 its own gradient vanishes, that of r does
not. Both z come from the layer's input through projections of low rank whose second half starts at zero; r starts at
1/2, where the decay is f.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from linearize.inits.base import Constant, Init, Normal
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.decays.base import Gate, GatedDecay, check_half_life, inverse_logsigmoid
from linearize.ops.layout import working_dtype


@dataclass(frozen=True)
class RefiningConfig(PartConfig):
    """Settings of the refining gate."""

    type: str = "refining"
    rank: int = 16
    """Columns of the first half of each projection."""
    half_life: tuple[float, float] = (32.0, 1024.0)
    """First half-lives in tokens of the first and the last head."""

    def __post_init__(self) -> None:
        check_half_life(self.half_life)
        if self.rank < 1:
            raise ValueError(f"decay.rank must be at least 1, got {self.rank}")


class Refining(GatedDecay):
    """See the module docstring."""

    Config = RefiningConfig
    granularity = "channel"

    def __init__(self, config: RefiningConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.down = nn.Parameter(torch.empty(2, config.rank, shape.hidden_size))
        self.up = nn.Parameter(torch.empty(2, shape.heads, shape.key_dim, config.rank))
        self.bias = nn.Parameter(torch.empty(shape.heads, shape.key_dim))
        self.refine_bias = nn.Parameter(torch.empty(shape.heads, shape.key_dim))

    def inits(self) -> dict[str, Init]:
        return {
            "down": Normal(self.shape.hidden_size**-0.5),
            "up": Constant(0.0),
            "bias": self.bias_init(),
            "refine_bias": Constant(0.0),
        }

    @staticmethod
    def offset(log_decay: torch.Tensor, config: Any) -> torch.Tensor:
        return inverse_logsigmoid(log_decay)

    def forward(self, x: torch.Tensor, k: torch.Tensor) -> Gate:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        z = torch.einsum("bter,ehfr->ebthf", torch.einsum("btc,erc->bter", x, down), up).to(working_dtype(x))
        first, refine = z[0] + self.bias, z[1] + self.refine_bias
        log_f = F.logsigmoid(first)
        # the same as f (f + 2 r (1 - f)); in logarithms it keeps its distance from 1, and from 0, where log is -inf
        g = log_f + torch.logaddexp(log_f, math.log(2) + F.logsigmoid(refine) + F.logsigmoid(-first))
        return Gate(g.clamp(max=0.0))
