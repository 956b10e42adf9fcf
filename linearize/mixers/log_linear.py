"""Log-linear attention: Mamba-2 or Gated DeltaNet with a state for each of a dozen distances.

    y_t = sum_l lambda_t^l q_t S_t^l,    S^l the state of the tokens in bucket l

Guo et al. 2025 (arXiv:2506.04761): buckets double in size with distance, so the state grows with the logarithm of the
length; here it stops growing at `update.levels`. `update: {rule: delta}` is the Gated DeltaNet form.

Traps: all levels at weight 1 are the plain recurrence, which is how it starts; levels longer than the training
sequences are never trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.decays.scalar import ScalarConfig
from linearize.mixers.parts.output import OutputConfig
from linearize.mixers.parts.updates.log_linear import LogLinearConfig


@dataclass(frozen=True)
class LogLinearMixerConfig(ComposedConfig):
    """Settings of the log_linear mixer."""

    decay: Any = part("decays", ScalarConfig)
    update: Any = part("updates", LogLinearConfig)
    scale: Literal["none", "sqrt"] = "sqrt"
    rope: Literal["both", "window", "recurrent", "features", "none"] = "none"
    output: OutputConfig = field(default_factory=lambda: OutputConfig(norm="rms", gate="silu", scale=True))


class LogLinearMixer(Composed):
    """See the module docstring."""

    Config = LogLinearMixerConfig
