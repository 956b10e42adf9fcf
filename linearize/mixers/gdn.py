"""Gated DeltaNet: a delta rule with a decay per head, a norm and a gate.

    S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T
    y_t = silu(x_t W_g + b) * rms_norm(q_t S_t / sqrt(d))

Yang et al. 2024 (arXiv:2412.06464), section 3; queries and keys at length 1, g = -exp(A) softplus(x W + b). With one
softmax layer in four it is the recipe `gdn_h`.

Departures: the convolution starts as the identity and has no activation, so that the teacher's keys survive it;
conversions (arXiv:2512.20569) do without. Traps: the copied init alone is no better than noise; see the calibrated one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.conv import ConvConfig
from linearize.mixers.parts.decays.scalar import ScalarConfig
from linearize.mixers.parts.output import OutputConfig
from linearize.mixers.parts.updates.delta import DeltaConfig


@dataclass(frozen=True)
class GdnConfig(ComposedConfig):
    """Settings of the gdn mixer."""

    decay: Any = part("decays", ScalarConfig)
    update: Any = part("updates", DeltaConfig)
    scale: Literal["none", "sqrt"] = "sqrt"
    rope: Literal["both", "window", "recurrent", "features", "none"] = "none"
    conv: ConvConfig = field(default_factory=lambda: ConvConfig(size=4, inputs="qkv"))
    output: OutputConfig = field(default_factory=lambda: OutputConfig(norm="rms", gate="silu", scale=True))


class Gdn(Composed):
    """See the module docstring."""

    Config = GdnConfig
