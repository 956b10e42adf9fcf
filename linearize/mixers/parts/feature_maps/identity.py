"""phi(x) = x."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.feature_maps.base import FeatureMap


@dataclass(frozen=True)
class IdentityConfig(PartConfig):
    """Settings of the identity map."""

    type: str = "identity"


class Identity(FeatureMap):
    """See the module docstring."""

    Config = IdentityConfig

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x
