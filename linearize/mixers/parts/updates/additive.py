"""S_t = D_t S_{t-1} + k_t v_t^T: linear attention (Katharopoulos et al. 2020, arXiv:2006.16236), with whatever decay
D_t.

Without a decay it is plain linear attention, with one per head RetNet, Mamba-2 or Lightning attention, with one per
channel GLA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.decays.base import Gate
from linearize.mixers.parts.updates.base import Operands, Read, Update, write_scaled
from linearize.ops.gla import gla
from linearize.ops.linear import bidirectional_linear_attention, linear_attention
from linearize.ops.simple_gla import simple_gla


@dataclass(frozen=True)
class AdditiveConfig(PartConfig):
    """Settings of the additive update."""

    type: str = "additive"


class Additive(Update):
    """See the module docstring. State: S [B, Hq, F, V], with normalisation also z [B, Hq, F]."""

    Config = AdditiveConfig
    title = "linear attention"
    titled_without_decay = True
    decays = ("none", "head", "channel")
    normalizes = True
    bidirectional = True

    def operands(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: Gate, x: torch.Tensor) -> Operands:
        g = gate.log_decay
        return Operands(simple_gla if g is None or g.dim() == 3 else gla, q, k, write_scaled(v, gate), (g,))

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
        if not self.shape.causal:
            num, den = bidirectional_linear_attention(q, k, v, mask=options["mask"])
            return (num, den, None) if normalize else (num * scale, None, None)
        if not normalize:
            return super().forward(q, k, v, gate, x, normalize=False, scale=scale, **options)
        # a common factor on all weights cancels, so there is no scale
        return linear_attention(q, k, write_scaled(v, gate), gate.log_decay, **options)
