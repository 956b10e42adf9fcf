"""Liger: gated linear attention whose gate is built from the keys, averaged with a softmax window; no new parameters.

    g_t = logsigmoid(k_t) / 16        S_t = diag(exp g_t) S_{t-1} + softmax(k_t) v_t^T
    y_t = (1 - mix) * softmax(q_t) S_t + mix * window_attention_t

Lan et al. 2025, Liger (arXiv:2503.01496), equations 7 to 10, GLA form, where the paper's pooling is the identity. Only
the window uses the rotary embedding. The gate reads k after any k-norm and before the rotary embedding. The paper's
other forms are the recipes `liger_gsa` and `liger_hgrn2`, this mixer with another update.

Traps: nothing is learned but the projections, so there is no stage of attention transfer; the released code forgets the
window when it decodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.combines.average import AverageConfig
from linearize.mixers.parts.decays.from_k import FromKConfig
from linearize.mixers.parts.feature_maps.softmax import SoftmaxConfig


@dataclass(frozen=True)
class LigerConfig(ComposedConfig):
    """Settings of the liger mixer."""

    feature_map: Any = part("feature_maps", SoftmaxConfig)
    decay: Any = part("decays", FromKConfig)
    window: int = 64
    combine: Any = part("combines", AverageConfig)
    rope: Literal["both", "window", "recurrent", "none"] = "window"


class Liger(Composed):
    """See the module docstring. State: the window's ring of keys and values, and S [B, Hq, K, V]."""

    Config = LigerConfig
