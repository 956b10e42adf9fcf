"""RWKV-7 from attention: a generalised delta rule with a decay and a removal rate per channel.

    S_t = (diag(w_t) - (a_t kappa_t) kappa_t^T) S_{t-1} + k~_t v_t^T    y_t = 2 sigmoid(z_t) * group_norm(q_t S_t)

Peng et al. 2025, RWKV-7 (arXiv:2503.14456), as RADLADS converts to it (arXiv:2505.03005): receptance, key and value are
the teacher's Q, K, V; no token shift.

Traps: hidden states must be aligned layer by layer first, which cannot be made good later; LoRA hurts in distillation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.decays.low_rank import LowRankConfig
from linearize.mixers.parts.output import OutputConfig
from linearize.mixers.parts.updates.rwkv7 import Rwkv7Config as Rwkv7UpdateConfig


@dataclass(frozen=True)
class Rwkv7Config(ComposedConfig):
    """Settings of the rwkv7 mixer."""

    decay: Any = part("decays", LowRankConfig, activation="bounded", rank=32)
    update: Any = part("updates", Rwkv7UpdateConfig)
    scale: Literal["none", "sqrt"] = "sqrt"
    rope: Literal["both", "window", "recurrent", "features", "none"] = "none"
    output: OutputConfig = field(
        default_factory=lambda: OutputConfig(norm="group", gate="sigmoid", gate_rank=64, scale=True)
    )


class Rwkv7(Composed):
    """See the module docstring."""

    Config = Rwkv7Config
