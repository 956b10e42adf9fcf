"""Hedgehog: linear attention with learned softmax-mimicking feature maps and no window.

    y_t = sum_{i<=t} phi(q_t).phi(k_i) v_i / sum_{i<=t} phi(q_t).phi(k_i)

Zhang et al. 2024, "The Hedgehog & the Porcupine" (arXiv:2402.04347), equations 4 to 6; maps per query head, applied
after the rotary embedding, untied for queries and keys.

Traps: the paper trains the maps on attention weights by cross-entropy, not on outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.feature_maps.hedgehog import HedgehogConfig as MapConfig


@dataclass(frozen=True)
class HedgehogConfig(ComposedConfig):
    """Settings of the hedgehog mixer."""

    feature_map: Any = part("feature_maps", MapConfig)
    normalize: bool = True


class Hedgehog(Composed):
    """See the module docstring. State: S [B, Hq, F, V] and z [B, Hq, F]."""

    Config = HedgehogConfig
