"""Several delta steps per token: DeltaProduct (Siems et al. 2025, arXiv:2502.10297).

    S_t = prod_j (I - beta_j k_j k_j^T) D_t S_{t-1} + the writes of each step, j = 1 .. n

The first step has the layer's own key and value; each further one has keys from a projection of its own and the layer's
values plus a learned projection, zero at first. Their beta starts small, so that the mixer starts as one delta rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from linearize.inits.base import Constant, Init, Normal
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig, part_inits
from linearize.mixers.parts.decays.base import Gate
from linearize.mixers.parts.updates.base import Operands, Update, WriteStrength, unit, write_scaled
from linearize.ops.delta_product import delta_product
from linearize.ops.layout import expand_heads


@dataclass(frozen=True)
class DeltaProductConfig(PartConfig):
    """Settings of the product of delta steps."""

    type: str = "delta_product"
    steps: int = 2
    """Delta steps per token."""
    beta: float = 0.5
    """First write strength of the first step, between 0 and its limit."""
    negative: bool = True
    """Whether beta may reach 2, which products of steps need to be rotations."""

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"update.steps must be at least 2, got {self.steps}; with 1 step use update delta")
        limit = 2 if self.negative else 1
        if not 0 < self.beta < limit:
            raise ValueError(f"update.beta must lie between 0 and {limit}, got {self.beta}")


class DeltaProduct(Update):
    """See the module docstring. State: S [B, Hq, F, V]."""

    Config = DeltaProductConfig
    title = "delta product"
    titled_without_decay = True
    decays = ("none", "head", "channel")
    linear_in_values = False  # the further steps' values have a part that is not the layer's

    def __init__(self, config: DeltaProductConfig, shape: HeadShape):
        super().__init__(config, shape)
        limit, more = 2.0 if config.negative else 1.0, config.steps - 1
        starts = [config.beta, *[0.02] * more]
        self.beta = nn.ModuleList(WriteStrength(shape, start, limit) for start in starts)
        self.key = nn.Parameter(torch.empty(shape.heads, more, shape.key_dim, shape.hidden_size))
        self.value = nn.Parameter(torch.empty(shape.heads, more, shape.value_dim, shape.hidden_size))

    def inits(self) -> dict[str, Init]:
        betas = {f"beta.{name}": init for name, init in part_inits(self.beta).items()}
        return {"key": Normal(self.shape.hidden_size**-0.5), "value": Constant(0.0), **betas}

    def calibrate(self, measured: Any) -> None:
        self.beta[0].calibrate(measured)  # type: ignore[operator]

    def operands(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: Gate, x: torch.Tensor) -> Operands:
        heads, v = self.shape.heads, write_scaled(v, gate)
        k, v = (expand_heads(t, heads).unsqueeze(3) for t in (k, v))
        more_k = torch.einsum("btc,hnkc->bthnk", x, self.key.to(x.dtype))
        more_v = v + torch.einsum("btc,hnvc->bthnv", x, self.value.to(x.dtype))
        k, v = torch.cat([unit(k), unit(more_k)], dim=3), torch.cat([v, more_v], dim=3)
        beta = torch.stack([strength(x) for strength in self.beta], dim=3)
        return Operands(delta_product, unit(q), k, v, (gate.log_decay, beta))
