"""Lightning attention in HALO's form: fixed decays, normed and rotated queries and keys, heads of their own, an output
gate.

    S_t = exp(-2^(-8 h / H)) S_{t-1} + k_t v_t^T    y_t = 2 sigmoid(x_t W_g + b) * rms_norm(q_t S_t)

HALO and HypeNet (2026, arXiv:2601.22156): queries and keys RMS-normed, rotary embedding in the recurrent layers (and
none in the kept softmax layers, whose logits grow with the logarithm of the length), key heads cloned to query heads,
no convolution.

Traps: the cloned heads must repeat whole heads in place; 25% of the layers are kept in the paper (`layers: LLLS`), and
which ones moves recall, not common sense; a learning rate of 1e-5 instead of 1e-4 in distillation costs 9 points.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.decays.fixed import FixedConfig
from linearize.mixers.parts.output import OutputConfig


@dataclass(frozen=True)
class LightningConfig(ComposedConfig):
    """Settings of the lightning mixer."""

    decay: Any = part("decays", FixedConfig, schedule="lightning")
    scale: Literal["none", "sqrt"] = "sqrt"
    rope: Literal["both", "window", "recurrent", "features", "none"] = "recurrent"
    qk_norm: Literal["none", "l2", "rms"] = "rms"
    kv_heads: Literal["shared", "cloned"] = "cloned"
    output: OutputConfig = field(default_factory=lambda: OutputConfig(norm="rms", gate="sigmoid", scale=True))


class Lightning(Composed):
    """See the module docstring."""

    Config = LightningConfig
