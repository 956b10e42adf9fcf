"""One constant decay per head, nothing learned.

`retnet`: 1 - exp(-decay) from 1/32 to 1/512, evenly in the logarithm over the heads: RetNet (Sun et al. 2023,
arXiv:2307.08621), section 2.1 and released code. `lightning`: exp(-2^(-8 h / H)), h = 1..H, the slopes of ALiBi:
Lightning Attention, as HALO uses it (arXiv:2601.22156).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.decays.base import Decay, Gate
from linearize.ops.layout import working_dtype


@dataclass(frozen=True)
class FixedConfig(PartConfig):
    """Settings of the fixed decay."""

    type: str = "fixed"
    schedule: Literal["retnet", "lightning"] = "lightning"
    """Which paper's constants."""


class Fixed(Decay):
    """See the module docstring."""

    Config = FixedConfig
    granularity = "head"
    title = "{} with a fixed decay"

    def forward(self, x: torch.Tensor, k: torch.Tensor) -> Gate:
        heads = self.shape.heads
        place = torch.arange(1, heads + 1, device=x.device, dtype=working_dtype(k))
        if self.config.schedule == "lightning":
            g = -(2.0 ** (-8.0 * place / heads))
        else:
            g = torch.log1p(-(2.0 ** (-5.0 - 4.0 * (place - 1) / max(heads - 1, 1))))
        return Gate(g.expand(*x.shape[:2], heads))
