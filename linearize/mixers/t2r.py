"""T2R: linear attention with learned relu features, the first conversion of a pretrained transformer.

    phi(x) = relu(x W + b)    y_t = sum_{i<=t} phi(q_t).phi(k_i) v_i / sum_{i<=t} phi(q_t).phi(k_i)

Kasai et al. 2021, "Finetuning Pretrained Transformers into RNNs" (arXiv:2103.13076), equations 5 and 6. W and b per
head.

Departure: W starts as [I, -I] instead of at random (`feature_map: {start: random}` is the paper's), which keeps both
signs of every channel. Traps: it was meant for full fine-tuning; a denominator near zero, where all features are off,
is possible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.feature_maps.relu import ReluConfig


@dataclass(frozen=True)
class T2rConfig(ComposedConfig):
    """Settings of the t2r mixer."""

    feature_map: Any = part("feature_maps", ReluConfig)
    normalize: bool = True


class T2r(Composed):
    """See the module docstring."""

    Config = T2rConfig
