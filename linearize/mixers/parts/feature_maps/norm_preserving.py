"""phi(x) = [softmax(u), softmax(-u)], u = |x| f(x) / |f(x)|, f(x) = x W: STILL's norm-preserving map.

STILL (2026, arXiv:2602.02180): the learned map may turn a vector but keeps its length, which decides how sharp the
features are. One W [D, F/2] per head, the identity at first, where the map is Hedgehog's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linearize.mixers.parts.feature_maps.hedgehog import Hedgehog, HedgehogConfig
from linearize.ops.layout import working_dtype


@dataclass(frozen=True)
class NormPreservingConfig(HedgehogConfig):
    """Settings of the norm-preserving map."""

    type: str = "norm_preserving"


class NormPreserving(Hedgehog):
    """See the module docstring."""

    Config = NormPreservingConfig

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(working_dtype(x))
        f = torch.einsum("bthd,hdf->bthf", x, self.weight.to(x.dtype))
        # rsqrt of a small sum keeps the gradient finite at a zero vector, which is what padding is
        u = f * ((x.square().sum(-1, keepdim=True) + 1e-12) / (f.square().sum(-1, keepdim=True) + 1e-12)).sqrt()
        return torch.cat([u.softmax(-1), (-u).softmax(-1)], dim=-1)
