"""phi(x) = [softmax(x W), softmax(-x W)] with one learned W [D, F/2] per head, the identity at first.

Hedgehog (Zhang et al. 2024, arXiv:2402.04347), equation 6 with the softmax over features of its released form, as
used by LoLCATs (arXiv:2410.10254).
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
class HedgehogConfig(PartConfig):
    """Settings of the hedgehog map."""

    type: str = "hedgehog"
    dim: int | None = None
    """Columns of W per head; there are twice as many features. Default: the head dimension."""

    def __post_init__(self) -> None:
        if self.dim is not None and self.dim < 1:
            raise ValueError(f"feature_map.dim must be at least 1, got {self.dim}")


class Hedgehog(FeatureMap):
    """See the module docstring."""

    Config = HedgehogConfig
    non_negative = True
    per_head = True

    def __init__(self, config: HedgehogConfig, shape: HeadShape):
        super().__init__(config, shape)
        columns = config.dim or shape.key_dim
        self.features = 2 * columns
        self.weight = nn.Parameter(torch.empty(shape.heads, shape.key_dim, columns))

    def inits(self) -> dict[str, Init]:
        return {"weight": Identity()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = projected(x, self.weight)
        z = z.to(working_dtype(z))
        return torch.stack([z, -z], dim=-2).softmax(-1).flatten(-2)
