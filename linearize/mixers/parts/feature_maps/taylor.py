"""phi with phi(q).phi(k) = 1 + s + s^2 / 2, s = q.k / sqrt(d): exp to second order (Based, Arora et al. 2024).

Based (arXiv:2402.18668), section 4.1: phi(x) = [1, x', x' (x) x' / sqrt 2] with x' = x / d^(1/4). The square has d^2
features, d (d + 1) / 2 of them different: the symmetric ones are merged here, which leaves every product as it is.
Based trains with d = 16; `dim` projects a head's d to fewer, with one learned map per head. Without it, a head of 64
has 2145 features and its state takes as much memory as 2145 cached tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from linearize.inits.base import Init, Normal
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.feature_maps.base import FeatureMap
from linearize.ops.layout import working_dtype


@dataclass(frozen=True)
class TaylorConfig(PartConfig):
    """Settings of the Taylor map."""

    type: str = "taylor"
    dim: int | None = 16
    """Size that a learned map per head brings vectors to first; null for none."""

    def __post_init__(self) -> None:
        if self.dim is not None and self.dim < 1:
            raise ValueError(f"feature_map.dim must be at least 1, got {self.dim}")


class Taylor(FeatureMap):
    """See the module docstring."""

    Config = TaylorConfig
    non_negative = True  # features can be negative, their products phi(q).phi(k) = 1 + s + s^2 / 2 cannot
    per_head = True

    def __init__(self, config: TaylorConfig, shape: HeadShape):
        super().__init__(config, shape)
        dim = config.dim or shape.key_dim
        self.features = 1 + dim + dim * (dim + 1) // 2
        self.dim = dim
        if config.dim is not None:
            self.weight = nn.Parameter(torch.empty(shape.heads, shape.key_dim, dim))

    def inits(self) -> dict[str, Init]:
        # Orthogonal in expectation and of a size that keeps q.k / sqrt(d): E[W W^T] = sqrt(dim / D) I.
        if self.config.dim is None:
            return {}
        return {"weight": Normal((self.dim * self.weight.shape[1]) ** -0.25)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(working_dtype(x))
        if self.config.dim is not None:
            x = torch.einsum("bthd,hdf->bthf", x, self.weight.to(x.dtype))
        x = x * self.dim**-0.25
        rows, columns = torch.triu_indices(self.dim, self.dim, device=x.device).unbind()
        weight = torch.where(rows == columns, x.new_tensor(0.5).sqrt(), 1.0)  # x_i x_j, i != j, is two features
        squares = x[..., rows] * x[..., columns] * weight
        return torch.cat([torch.ones_like(x[..., :1]), x, squares], dim=-1)
