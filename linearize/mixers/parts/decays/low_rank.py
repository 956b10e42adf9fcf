"""One data-dependent decay per key channel, from the layer's input through a projection of low rank.

z = (x W_down) W_up + bias, and by `activation`:
- `sigmoid`: g = logsigmoid(z) / normalizer: GLA (Yang et al. 2023, arXiv:2312.06635), section 4.4;
- `softplus`: g = -exp(A) softplus(z), A per head: KDA (Kimi Linear, arXiv:2510.26692), section 3;
- `bounded`: g = -exp(-1/2) sigmoid(z), never below -0.61 a token: RWKV-7 (arXiv:2503.14456), equation 12.
W_up starts at zero, so that the decay is the bias's at first; its own gradient is not zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from linearize.inits.base import Constant, Init, Normal
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.decays.base import (
    Gate,
    GatedDecay,
    check_half_life,
    inverse_logsigmoid,
    inverse_softplus,
)
from linearize.ops.layout import working_dtype


@dataclass(frozen=True)
class LowRankConfig(PartConfig):
    """Settings of the decay per channel."""

    type: str = "low_rank"
    rank: int = 16
    """Columns of W_down."""
    activation: Literal["sigmoid", "softplus", "bounded"] = "sigmoid"
    """From z to the log-decay, see above."""
    normalizer: float = 16.0
    """Divisor of the log-gate under `sigmoid`."""
    half_life: tuple[float, float] = (32.0, 1024.0)
    """First half-lives in tokens of the first and the last head."""

    def __post_init__(self) -> None:
        check_half_life(self.half_life)
        if self.rank < 1:
            raise ValueError(f"decay.rank must be at least 1, got {self.rank}")
        if not 0 < self.normalizer < math.inf:
            raise ValueError(f"decay.normalizer must be positive, got {self.normalizer}")


class LowRank(GatedDecay):
    """See the module docstring."""

    Config = LowRankConfig
    granularity = "channel"

    def __init__(self, config: LowRankConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.down = nn.Parameter(torch.empty(config.rank, shape.hidden_size))
        self.up = nn.Parameter(torch.empty(shape.heads, shape.key_dim, config.rank))
        self.bias = nn.Parameter(torch.empty(shape.heads, shape.key_dim))
        if config.activation == "softplus":
            self.log_rate = nn.Parameter(torch.empty(shape.heads, 1))

    def inits(self) -> dict[str, Init]:
        inits = {"down": Normal(self.shape.hidden_size**-0.5), "up": Constant(0.0), "bias": self.bias_init()}
        return {**inits, "log_rate": Constant(0.0)} if self.config.activation == "softplus" else inits

    @staticmethod
    def offset(log_decay: torch.Tensor, config: Any) -> torch.Tensor:
        if config.activation == "softplus":
            return inverse_softplus(-log_decay)
        if config.activation == "bounded":
            return torch.logit((-log_decay * math.exp(0.5)).clamp(max=0.999))
        return inverse_logsigmoid(log_decay * config.normalizer)

    def forward(self, x: torch.Tensor, k: torch.Tensor) -> Gate:
        z = torch.einsum("btr,hfr->bthf", F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        z = z.to(working_dtype(z)) + self.bias
        if self.config.activation == "softplus":
            return Gate(-self.log_rate.to(z.dtype).exp() * F.softplus(z))
        if self.config.activation == "bounded":
            return Gate(-math.exp(-0.5) * z.sigmoid())
        return Gate(F.logsigmoid(z) / self.config.normalizer)
