"""Kimi Delta Attention: a delta rule with a decay per channel, a norm and a sigmoid gate of low rank.

    S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T
    y_t = 2 sigmoid(z_t) * rms_norm(q_t S_t / sqrt(d))

Kimi Linear (2025, arXiv:2510.26692), section 3; queries and keys at length 1, g = -exp(A) softplus((x W_1) W_2 + b).
The paper keeps one softmax layer in four (`layers: LLLS`), without position embedding.

Departures: convolution and gate start as the identity. Traps: as for `gdn`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.conv import ConvConfig
from linearize.mixers.parts.decays.low_rank import LowRankConfig
from linearize.mixers.parts.output import OutputConfig
from linearize.mixers.parts.updates.delta import DeltaConfig


@dataclass(frozen=True)
class KdaConfig(ComposedConfig):
    """Settings of the kda mixer."""

    decay: Any = part("decays", LowRankConfig, activation="softplus")
    update: Any = part("updates", DeltaConfig)
    scale: Literal["none", "sqrt"] = "sqrt"
    rope: Literal["both", "window", "recurrent", "features", "none"] = "none"
    conv: ConvConfig = field(default_factory=lambda: ConvConfig(size=4, inputs="qkv"))
    output: OutputConfig = field(
        default_factory=lambda: OutputConfig(norm="rms", gate="sigmoid", gate_rank=64, scale=True)
    )


class Kda(Composed):
    """See the module docstring."""

    Config = KdaConfig
