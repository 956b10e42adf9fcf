"""phi(x) = relu(x W + b), one learned W and b per head: T2R (Kasai et al. 2021, arXiv:2103.13076), equation 5.

W starts as T2R's random values or, with `start: identity`, as [I, -I], which keeps both signs of every input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from linearize.inits.base import Constant, Init, KaimingUniform, SignedIdentity
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.feature_maps.base import FeatureMap, projected
from linearize.ops.layout import working_dtype


@dataclass(frozen=True)
class ReluConfig(PartConfig):
    """Settings of the relu map."""

    type: str = "relu"
    dim: int | None = None
    """Features per head. Default: twice the head dimension, or as many under `same_size`."""
    same_size: bool = False
    """Whether there are as many features as channels, which a rotation after the map needs."""
    start: Literal["identity", "random"] = "identity"
    """First values of W: [I, -I], or uniform with the fan-in of one head (Kaiming)."""

    def __post_init__(self) -> None:
        if self.dim is not None and self.dim < 1:
            raise ValueError(f"feature_map.dim must be at least 1, got {self.dim}")
        if self.dim is not None and self.same_size:
            raise ValueError("feature_map.dim and feature_map.same_size both set the number of features; give one")


class Relu(FeatureMap):
    """See the module docstring."""

    Config = ReluConfig
    non_negative = True
    per_head = True

    def __init__(self, config: ReluConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.features = config.dim or (1 if config.same_size else 2) * shape.key_dim
        self.weight = nn.Parameter(torch.empty(shape.heads, shape.key_dim, self.features))
        self.bias = nn.Parameter(torch.empty(shape.heads, self.features))

    def inits(self) -> dict[str, Init]:
        weight = SignedIdentity() if self.config.start == "identity" else KaimingUniform()
        return {"weight": weight, "bias": Constant(0.0)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = projected(x, self.weight) + self.bias
        return z.to(working_dtype(z)).relu()
