"""Nothing is ever forgotten."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.decays.base import Decay, Gate


@dataclass(frozen=True)
class NoneConfig(PartConfig):
    """Settings of no decay."""

    type: str = "none"


class NoDecay(Decay):
    """See the module docstring."""

    Config = NoneConfig
    granularity = "none"
    title = "{}"

    def forward(self, x: torch.Tensor, k: torch.Tensor) -> Gate:
        return Gate(None)
