"""y = mix window + (1 - mix) recurrent, a constant mix: Liger (arXiv:2503.01496), equation 10."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.combines.base import Combine, Memory, Window


@dataclass(frozen=True)
class AverageConfig(PartConfig):
    """Settings of the average."""

    type: str = "average"
    mix: float = 0.5
    """Weight of the window; the recurrent branch gets the rest."""

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise ValueError(f"combine.mix must lie between 0 and 1, got {self.mix}")


class Average(Combine):
    """See the module docstring."""

    Config = AverageConfig

    def window_weight(self, window: Window, memory: Memory, x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(window.lse, self.config.mix)

    def forward(self, window: Window, memory: Memory, x: torch.Tensor) -> torch.Tensor:
        mix = self.config.mix
        return mix * window.out + (1 - mix) * memory.out
