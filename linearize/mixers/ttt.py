"""TTT-linear: the state is a small model that learns to map keys to values while it reads.

    y_t = 2 sigmoid(z_t) * rms_norm(f(q_t; W_t)),    f(z; W) = z + LN(z W + b)

Sun et al. 2024, "Learning to (Learn at Test Time)" (arXiv:2407.04620), in mini-batches of 16 tokens.

Departure: the factor of the place in the mini-batch is left out. Traps: mini-batches count from the start of the
sequence, so their size changes results; it is slower than a delta rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.output import OutputConfig
from linearize.mixers.parts.updates.ttt import TttConfig


@dataclass(frozen=True)
class TttMixerConfig(ComposedConfig):
    """Settings of the ttt mixer."""

    update: Any = part("updates", TttConfig)
    rope: Literal["both", "window", "recurrent", "features", "none"] = "none"
    output: OutputConfig = field(
        default_factory=lambda: OutputConfig(norm="rms", gate="sigmoid", gate_rank=64, scale=True)
    )


class TttMixer(Composed):
    """See the module docstring."""

    Config = TttMixerConfig
