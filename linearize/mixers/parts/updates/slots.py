"""A token is written into M slots, and a query attends to the slots by softmax: gated slot attention (GSA).

Zhang et al. 2024 (arXiv:2409.07146), equations 5 and 6. The decay per channel is one per slot; a slot takes in what it
forgets, 1 - decay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.decays.base import Gate
from linearize.mixers.parts.updates.base import Operands, Update, write_scaled
from linearize.ops.gsa import gsa


@dataclass(frozen=True)
class SlotsConfig(PartConfig):
    """Settings of the slots."""

    type: str = "slots"
    slots: int | None = None
    """Slots per head. Default: one per feature."""

    def __post_init__(self) -> None:
        if self.slots is not None and self.slots < 1:
            raise ValueError(f"update.slots must be at least 1, got {self.slots}")


class Slots(Update):
    """See the module docstring. State: the slots' keys [B, Hq, F, M] and values [B, Hq, M, V]."""

    Config = SlotsConfig
    title = "gated slot attention"
    decays = ("channel",)

    def decay_channels(self) -> int:
        return self.config.slots or self.shape.key_dim

    def operands(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: Gate, x: torch.Tensor) -> Operands:
        g = gate.log_decay
        assert g is not None
        return Operands(gsa, q, k, write_scaled(v, gate), (g, -torch.expm1(g)))
