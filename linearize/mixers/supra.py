"""SUPRA: relu features that are rotated after the map, RetNet's decay, and a group norm instead of a denominator.

    y_t = group_norm(sum_{i<=t} gamma_h^(t-i) R_t phi(q_t) . R_i phi(k_i) v_i),    phi(x) = relu(x W + b)

Mercat et al. 2024, "Linearizing Large Language Models" (arXiv:2405.06640), section 3. A factor per head follows the
norm.

Departure: W starts as the identity. Traps: the paper needs 20B to 100B tokens of uptraining; a denominator instead of
the norm is unstable with rotated features, whose products can be negative.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.decays.fixed import FixedConfig
from linearize.mixers.parts.feature_maps.relu import ReluConfig
from linearize.mixers.parts.output import OutputConfig


@dataclass(frozen=True)
class SupraConfig(ComposedConfig):
    """Settings of the supra mixer."""

    feature_map: Any = part("feature_maps", ReluConfig, same_size=True)
    decay: Any = part("decays", FixedConfig, schedule="retnet")
    rope: Literal["both", "window", "recurrent", "features", "none"] = "features"
    output: OutputConfig = field(default_factory=lambda: OutputConfig(norm="group", scale=True))


class Supra(Composed):
    """See the module docstring."""

    Config = SupraConfig
