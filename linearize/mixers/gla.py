"""GLA: gated linear attention with a data-dependent decay per channel, a norm and a gate.

    S_t = diag(exp g_t) S_{t-1} + k_t v_t^T    y_t = silu(x_t W_g + b) * rms_norm(q_t S_t / sqrt(d))
    g_t = logsigmoid((x_t W_1) W_2 + b) / 16

Yang et al. 2023, GLA (arXiv:2312.06635), section 4. No rotary embedding: the gate carries order.

Traps: copied queries and keys were trained for softmax; the calibrated init sets gates and output size from the
teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.decays.low_rank import LowRankConfig
from linearize.mixers.parts.output import OutputConfig


@dataclass(frozen=True)
class GlaConfig(ComposedConfig):
    """Settings of the gla mixer."""

    decay: Any = part("decays", LowRankConfig)
    scale: Literal["none", "sqrt"] = "sqrt"
    rope: Literal["both", "window", "recurrent", "features", "none"] = "none"
    output: OutputConfig = field(default_factory=lambda: OutputConfig(norm="rms", gate="silu", scale=True))


class Gla(Composed):
    """See the module docstring."""

    Config = GlaConfig
