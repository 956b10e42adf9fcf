"""S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T: what is forgotten makes room for what is written, and keys are not used.

HGRN2 (Qin et al. 2024, arXiv:2404.07904), equation 4; f is the decay per channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.decays.base import Gate
from linearize.mixers.parts.updates.base import Read, Update, write_scaled
from linearize.ops.gla import gla


@dataclass(frozen=True)
class Hgrn2Config(PartConfig):
    """Settings of the HGRN2 update."""

    type: str = "hgrn2"


class Hgrn2(Update):
    """See the module docstring. State: S [B, Hq, F, V]."""

    Config = Hgrn2Config
    decays = ("channel",)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gate: Gate,
        x: torch.Tensor,
        *,
        normalize: bool,
        scale: float,
        **options: Any,
    ) -> Read:
        g = gate.log_decay
        assert g is not None
        y, state = gla(q, -torch.expm1(g), write_scaled(v, gate), g, scale=scale, **options)
        return y, None, state
