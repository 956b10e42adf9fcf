"""phi(x) = x sigmoid(x), the activation before the delta rule in Gated DeltaNet (Yang et al. 2024,
arXiv:2412.06464).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.feature_maps.base import FeatureMap


@dataclass(frozen=True)
class SiluConfig(PartConfig):
    """Settings of the silu map."""

    type: str = "silu"


class Silu(FeatureMap):
    """See the module docstring."""

    Config = SiluConfig

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x)
