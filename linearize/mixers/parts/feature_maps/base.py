"""The feature map contract."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import Part


class FeatureMap(Part):
    """phi: [B, T, H, D] -> [B, T, H, F]; one for queries and one for keys.

    Args:
        config: an instance of the subclass's `Config`.
        shape: sizes of the layer; `key_dim` is D and `heads` the query heads.
    """

    features: int
    """F."""
    non_negative: ClassVar[bool] = False
    """Whether phi(q).phi(k) is never negative, so that sums of it can normalise."""
    per_head: ClassVar[bool] = False
    """Whether each query head has parameters of its own, so that keys are expanded before the map."""

    def __init__(self, config: Any, shape: HeadShape):
        super().__init__()
        self.config = config
        self.features = shape.key_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H, D] -> [B, T, H, F]."""
        raise NotImplementedError


def projected(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [B, T, H, D] times weight [H, D, F] in the weight's precision, or in that of autocast: [B, T, H, F]."""
    x = x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
    return torch.einsum("bthd,hdf->bthf", x, weight)
