"""S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T: what is forgotten makes room for what is written, and keys are not used.

HGRN2 (Qin et al. 2024, arXiv:2404.07904), equation 4; f is the decay per channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.decays.base import Gate
from linearize.mixers.parts.updates.base import Operands, Update, write_scaled
from linearize.ops.gla import gla


@dataclass(frozen=True)
class Hgrn2Config(PartConfig):
    """Settings of the HGRN2 update."""

    type: str = "hgrn2"


class Hgrn2(Update):
    """See the module docstring. State: S [B, Hq, F, V]."""

    Config = Hgrn2Config
    title = "HGRN2"
    decays = ("channel",)

    def operands(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: Gate, x: torch.Tensor) -> Operands:
        g = gate.log_decay
        assert g is not None
        return Operands(gla, q, -torch.expm1(g), write_scaled(v, gate), (g,))
