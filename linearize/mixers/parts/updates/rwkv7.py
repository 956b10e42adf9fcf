"""S_t = (diag(w_t) - (a_t kappa_t) kappa_t^T) S_{t-1} + k~_t v_t^T: RWKV-7's generalised delta rule.

Peng et al. 2025 (arXiv:2503.14456), equations 8 to 17: kappa is the key times a learned scale at length 1, a in (0, 1)
says per channel how much of it is removed, and k~ = k (1 + (a - 1) alpha) is what is written. The current token is read
once more with a learned bonus. Token shift and the mixing of values across layers are left out, as in conversions
(RADLADS, arXiv:2505.03005).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from linearize.inits.base import Constant, Init, Normal
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.decays.base import Gate
from linearize.mixers.parts.updates.base import Operands, Read, Update, unit, write_scaled
from linearize.ops.dplr import dplr
from linearize.ops.layout import expand_heads, working_dtype


@dataclass(frozen=True)
class Rwkv7Config(PartConfig):
    """Settings of the RWKV-7 update."""

    type: str = "rwkv7"
    rank: int = 16
    """Rank of the projection that makes a."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"update.rank must be at least 1, got {self.rank}")


class Rwkv7(Update):
    """See the module docstring. State: S [B, Hq, F, V]."""

    Config = Rwkv7Config
    title = "RWKV-7"
    routable = False
    decays = ("channel",)

    def __init__(self, config: Rwkv7Config, shape: HeadShape):
        super().__init__(config, shape)
        heads, size = shape.heads, shape.key_dim
        self.down = nn.Parameter(torch.empty(config.rank, shape.hidden_size))
        self.up = nn.Parameter(torch.empty(heads, size, config.rank))
        self.bias = nn.Parameter(torch.empty(heads, size))
        self.removal_scale = nn.Parameter(torch.empty(heads, size))
        self.write_mix = nn.Parameter(torch.empty(heads, size))
        self.bonus = nn.Parameter(torch.empty(heads, size))

    def inits(self) -> dict[str, Init]:
        return {
            "down": Normal(self.shape.hidden_size**-0.5),
            "up": Constant(0.0),
            "bias": Constant(0.0),
            "removal_scale": Constant(1.0),
            "write_mix": Constant(1.0),
            "bonus": Constant(0.0),
        }

    def operands(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: Gate, x: torch.Tensor) -> Operands:
        dtype = working_dtype(k)
        k, v = expand_heads(k, self.shape.heads).to(dtype), expand_heads(write_scaled(v, gate), self.shape.heads)
        z = torch.einsum("btr,hfr->bthf", F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        a = (z.to(dtype) + self.bias).sigmoid()
        kappa = unit(k * self.removal_scale)
        k = k * (1 + (a - 1) * self.write_mix)
        return Operands(dplr, q, k, v, (gate.log_decay, -kappa, kappa * a))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gate: Gate,
        x: torch.Tensor,
        *,
        normalize: bool,
        scale: float,
        **options: Any,
    ) -> Read:
        op, q, k, v, gates = self.operands(q, k, v, gate, x)
        y, state = op(q, k, v, *gates, scale=scale, **options)
        own = (q.to(k.dtype) * k * self.bonus).sum(-1, keepdim=True) * scale
        return y + (own * v).to(y.dtype), None, state
