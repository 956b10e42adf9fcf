"""ReGLA: gated linear attention with a safe exponential feature map, a norm and a refining gate.

Lu et al. 2025, ReGLA (arXiv:2502.01578): exp features bounded by their maximum and scaled to a variance that does not
depend on the head size, RMS-normed outputs, and a second gate that keeps the forget gate from saturating.

Traps: without the norm the output grows with the context; the gate's gradient vanishes near 0 and 1 without refinement.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.decays.refining import RefiningConfig
from linearize.mixers.parts.feature_maps.safe_exp import SafeExpConfig
from linearize.mixers.parts.output import OutputConfig


@dataclass(frozen=True)
class ReglaConfig(ComposedConfig):
    """Settings of the regla mixer."""

    feature_map: Any = part("feature_maps", SafeExpConfig)
    decay: Any = part("decays", RefiningConfig)
    rope: Literal["both", "window", "recurrent", "features", "none"] = "both"
    output: OutputConfig = field(default_factory=lambda: OutputConfig(norm="rms", scale=True))


class Regla(Composed):
    """See the module docstring."""

    Config = ReglaConfig
