"""phi(x) = softmax(x) over the features of a head, as in Liger (arXiv:2503.01496) and xLSTM distillation
(2603.15590).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.feature_maps.base import FeatureMap
from linearize.ops.layout import working_dtype


@dataclass(frozen=True)
class SoftmaxConfig(PartConfig):
    """Settings of the softmax map."""

    type: str = "softmax"


class Softmax(FeatureMap):
    """See the module docstring."""

    Config = SoftmaxConfig
    non_negative = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(working_dtype(x)).softmax(-1)
