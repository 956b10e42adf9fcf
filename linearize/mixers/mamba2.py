"""Mamba-2 from attention: C, B, x, O are the teacher's Q, K, V, O.

    S_t = exp(-exp(A_h) dt_t) S_{t-1} + dt_t k_t v_t^T    y_t = silu(x_t W_z + b) * rms_norm(q_t S_t + D_h v_t)
    dt_t = softplus(x_t W_dt + b)

Dao & Gu 2024 (arXiv:2405.21060), section 6, initialised as in Mamba in the Llama (Wang et al. 2024, arXiv:2408.15237).
With
`feature_map: hedgehog` it is the second stage of Attention to Mamba (2026, arXiv:2604.14191), the recipe `hedgemamba`.

Departures: convolution, gate and D start as the identity. Traps: dt scales both what is forgotten and what is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.conv import ConvConfig
from linearize.mixers.parts.decays.scalar import ScalarConfig
from linearize.mixers.parts.output import OutputConfig


@dataclass(frozen=True)
class Mamba2Config(ComposedConfig):
    """Settings of the mamba2 mixer."""

    decay: Any = part("decays", ScalarConfig, write=True)
    rope: Literal["both", "window", "recurrent", "features", "none"] = "none"
    conv: ConvConfig = field(default_factory=lambda: ConvConfig(size=4, inputs="qkv"))
    output: OutputConfig = field(default_factory=lambda: OutputConfig(norm="rms", gate="silu", scale=True))
    skip: bool = True


class Mamba2(Composed):
    """See the module docstring."""

    Config = Mamba2Config
