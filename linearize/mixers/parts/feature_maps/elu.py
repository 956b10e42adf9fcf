"""phi(x) = elu(x) + 1 (Katharopoulos et al. 2020, arXiv:2006.16236, equation 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.feature_maps.base import FeatureMap
from linearize.ops.layout import working_dtype


@dataclass(frozen=True)
class EluConfig(PartConfig):
    """Settings of the elu map."""

    type: str = "elu"


class Elu(FeatureMap):
    """See the module docstring."""

    Config = EluConfig
    non_negative = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.elu(x.to(working_dtype(x))) + 1
