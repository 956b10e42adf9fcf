"""phi(x) = exp(x W - max(x W)) sqrt(e / ((e - 1) F)), F features: ReGLA's safe exponential.

ReGLA (Lu et al. 2025, arXiv:2502.01578), sections 3.1 and 3.2: the maximum over the features keeps exp bounded by 1,
and the factor keeps phi(q).phi(k) from growing with F. One learned W per head, the identity at first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from linearize.inits.base import Identity, Init
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.feature_maps.base import FeatureMap, projected
from linearize.ops.layout import working_dtype


@dataclass(frozen=True)
class SafeExpConfig(PartConfig):
    """Settings of the safe exponential map."""

    type: str = "safe_exp"


class SafeExp(FeatureMap):
    """See the module docstring."""

    Config = SafeExpConfig
    non_negative = True
    per_head = True

    def __init__(self, config: SafeExpConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.weight = nn.Parameter(torch.empty(shape.heads, shape.key_dim, shape.key_dim))

    def inits(self) -> dict[str, Init]:
        return {"weight": Identity()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = projected(x, self.weight)
        z = z.to(working_dtype(z))
        # exp of a standard normal has variance e (e - 1), which the factor brings to e^2 / F; the maximum then divides
        # all features of a token by one number.
        return (z - z.amax(-1, keepdim=True)).exp() * (torch.e / ((torch.e - 1) * self.features)) ** 0.5
