"""y = window + recurrent, as in Lizard (arXiv:2507.09025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.combines.base import Combine, Memory, Window


@dataclass(frozen=True)
class SumConfig(PartConfig):
    """Settings of the sum."""

    type: str = "sum"


class Sum(Combine):
    """See the module docstring."""

    Config = SumConfig

    def window_weight(self, window: Window, memory: Memory, x: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(window.lse)

    def forward(self, window: Window, memory: Memory, x: torch.Tensor) -> torch.Tensor:
        return window.out + memory.out
