"""phi(x) = [softmax(u), softmax(-u)], u = |x| f(x) / |f(x)|, f(x) = x W: STILL's norm-preserving map.

STILL (2026, arXiv:2602.02180): the learned map may turn a vector but keeps its length, which decides how sharp the
features are. One W [D, F/2] per head, the identity at first, where the map is Hedgehog's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from linearize.inits.base import Identity, Init
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.feature_maps.base import FeatureMap
from linearize.ops.layout import working_dtype


@dataclass(frozen=True)
class NormPreservingConfig(PartConfig):
    """Settings of the norm-preserving map."""

    type: str = "norm_preserving"
    dim: int | None = None
    """Columns of W per head; there are twice as many features. Default: the head dimension."""

    def __post_init__(self) -> None:
        if self.dim is not None and self.dim < 1:
            raise ValueError(f"feature_map.dim must be at least 1, got {self.dim}")


class NormPreserving(FeatureMap):
    """See the module docstring."""

    Config = NormPreservingConfig
    non_negative = True
    per_head = True

    def __init__(self, config: NormPreservingConfig, shape: HeadShape):
        super().__init__(config, shape)
        columns = config.dim or shape.key_dim
        self.features = 2 * columns
        self.weight = nn.Parameter(torch.empty(shape.heads, shape.key_dim, columns))

    def inits(self) -> dict[str, Init]:
        return {"weight": Identity()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(working_dtype(x))
        f = torch.einsum("bthd,hdf->bthf", x, self.weight.to(x.dtype))
        # rsqrt of a small sum keeps the gradient finite at a zero vector, which is what padding is
        u = f * ((x.square().sum(-1, keepdim=True) + 1e-12) / (f.square().sum(-1, keepdim=True) + 1e-12)).sqrt()
        return torch.cat([u.softmax(-1), (-u).softmax(-1)], dim=-1)
