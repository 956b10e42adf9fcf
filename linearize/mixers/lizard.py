"""Lizard: gated linear attention with learned features, beside a softmax window with learned meta tokens.

    y_t = window_attention_t + c_h phi(q_t) S_t / (phi(q_t) z_t),    S_t = diag(exp g_t) S_{t-1} + phi(k_t) v_t^T

Nguyen et al. 2025, Lizard (arXiv:2507.09025): phi is Hedgehog's map, the gate of GLA takes the place of the rotary
embedding in the linear branch, and meta tokens the place of attention sinks. No code was released.

Departures: the gate's projection has low rank; the read-out is normalised and has a factor c_h per head, so that the
sum of the two branches can start at the right size. Traps: train maps, gate and meta tokens first (attention transfer);
fine-tuning an untrained sum does not recover.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.combines.sum import SumConfig
from linearize.mixers.parts.decays.low_rank import LowRankConfig
from linearize.mixers.parts.feature_maps.hedgehog import HedgehogConfig
from linearize.mixers.parts.output import OutputConfig


@dataclass(frozen=True)
class LizardConfig(ComposedConfig):
    """Settings of the lizard mixer."""

    feature_map: Any = part("feature_maps", HedgehogConfig)
    decay: Any = part("decays", LowRankConfig)
    normalize: bool = True
    window: int = 128
    meta_tokens: int = 4
    combine: Any = part("combines", SumConfig)
    rope: Literal["both", "window", "recurrent", "features", "none"] = "window"
    output: OutputConfig = field(default_factory=lambda: OutputConfig(scale=True))


class Lizard(Composed):
    """See the module docstring."""

    Config = LizardConfig
