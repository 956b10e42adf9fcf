"""Learnable feature maps: they turn a query or key vector into non-negative features for linear attention.

`feature_map(config, heads, dim)` builds the map that a config names. A map is applied per head, after any rotary
embedding, to [B, T, H, D], and gives [B, T, H, F].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from linearize.errors import did_you_mean
from linearize.inits.base import Identity, Init
from linearize.ops.layout import working_dtype


@dataclass(frozen=True)
class FeatureMapConfig:
    """Which feature map, and how large."""

    __pydantic_config__ = {"extra": "forbid"}

    type: str = "hedgehog"
    """Name of the map: hedgehog."""
    dim: int | None = None
    """Columns of the learned map per head; hedgehog gives twice as many features. Default: the head dimension."""

    def __post_init__(self) -> None:
        if self.type not in MAPS:
            raise ValueError(f"unknown feature map {self.type!r}{did_you_mean(self.type, MAPS)}")
        if self.dim is not None and self.dim < 1:
            raise ValueError(f"feature_map.dim must be at least 1, got {self.dim}")


class FeatureMap(nn.Module):
    """Base class: `features` is F, the size of what `forward` returns per head."""

    features: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H, D] -> [B, T, H, F], elementwise non-negative."""
        raise NotImplementedError

    def inits(self) -> dict[str, Init]:
        """How each parameter is initialised, by its name inside the map."""
        raise NotImplementedError


class Hedgehog(FeatureMap):
    """phi(x) = [softmax(xW), softmax(-xW)] with one W [D, F/2] per head.

    Hedgehog (Zhang et al. 2024, arXiv:2402.04347), equation 6 with the softmax over features of its released form, as
    used by LoLCATs (arXiv:2410.10254). W starts as the identity.
    """

    def __init__(self, heads: int, dim: int, columns: int):
        super().__init__()
        self.features = 2 * columns
        self.weight = nn.Parameter(torch.empty(heads, dim, columns))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        z = torch.einsum("bthd,hdf->bthf", x.to(weight.dtype), weight)
        z = z.to(working_dtype(z))
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], dim=-1)

    def inits(self) -> dict[str, Init]:
        return {"weight": Identity()}


MAPS = {"hedgehog": Hedgehog}


def feature_map(config: FeatureMapConfig, heads: int, dim: int) -> FeatureMap:
    """Build the map that `config` names for `heads` heads of size `dim`."""
    return MAPS[config.type](heads, dim, config.dim or dim)


def map_inits(**maps: FeatureMap) -> dict[str, Init]:
    """The inits of several maps, by their names inside the mixer that holds them."""
    return {f"{name}.{key}": init for name, part in maps.items() for key, init in part.inits().items()}
