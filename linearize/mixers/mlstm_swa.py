"""mLSTM beside a sliding window with sinks, mixed by a learned gate: the form that xLSTM models are distilled to.

    y_t = m_t window_attention_t + (1 - m_t) mlstm_t,    m_t = sigmoid(x_t W + b) per head

xLSTM distillation (2026, arXiv:2603.15590): softmax features without rotary embedding, exponential input gate, sigmoid
forget gate, normaliser; window 512 with 4 sinks.

Traps: the paper finds the sinks essential; on a teacher with rotary embedding, their distance is unseen beyond its
trained length, where they do harm (`sinks: 0`). The first stage trains maps and gates alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.combines.sigmoid import SigmoidConfig
from linearize.mixers.parts.decays.sigmoid import SigmoidConfig as SigmoidDecayConfig
from linearize.mixers.parts.feature_maps.softmax import SoftmaxConfig
from linearize.mixers.parts.updates.mlstm import MlstmConfig


@dataclass(frozen=True)
class MlstmSwaConfig(ComposedConfig):
    """Settings of the mlstm_swa mixer."""

    feature_map: Any = part("feature_maps", SoftmaxConfig)
    decay: Any = part("decays", SigmoidDecayConfig)
    update: Any = part("updates", MlstmConfig)
    window: int = 512
    sinks: int = 4
    combine: Any = part("combines", SigmoidConfig)
    rope: Literal["both", "window", "recurrent", "features", "none"] = "window"


class MlstmSwa(Composed):
    """See the module docstring."""

    Config = MlstmSwaConfig
