"""LAWCAT: a short convolution on queries and keys, then normalised gated linear attention.

Liu et al. 2025, LAWCAT (arXiv:2509.18467): the convolution gives every key a little of its neighbours, so that one
linear step can match what softmax found in several; the normalised gate lets a model trained at 1K tokens recall beyond
20K.

The paper's abstract and results were at hand, not its equations: features are a softmax over channels and the gate is
GLA's. Traps: the convolution must start as the identity; the decay is normalised with its weights, or long contexts
shrink.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.conv import ConvConfig
from linearize.mixers.parts.decays.low_rank import LowRankConfig
from linearize.mixers.parts.feature_maps.softmax import SoftmaxConfig


@dataclass(frozen=True)
class LawcatConfig(ComposedConfig):
    """Settings of the lawcat mixer."""

    feature_map: Any = part("feature_maps", SoftmaxConfig)
    decay: Any = part("decays", LowRankConfig)
    normalize: bool = True
    conv: ConvConfig = field(default_factory=lambda: ConvConfig(size=4, inputs="qk"))
    rope: Literal["both", "window", "recurrent", "features", "none"] = "none"


class Lawcat(Composed):
    """See the module docstring."""

    Config = LawcatConfig
