"""Based: linear attention whose features are the second-order Taylor expansion of exp, on few channels.

    phi(q).phi(k) = 1 + s + s^2 / 2,  s = q'.k' / sqrt(d'),  q', k' the heads projected to d' = 16

Arora et al. 2024, Based (arXiv:2402.18668), section 4. The paper puts it beside layers of sliding-window attention;
here `layers` keeps softmax layers, and `window: 64, combine: {type: shared_denominator}` puts a window into the same
layer.

Traps: the features grow with the square of d'; the expansion holds for small s, and a teacher's s is not small, so the
projection has to be trained by attention transfer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.feature_maps.taylor import TaylorConfig


@dataclass(frozen=True)
class BasedConfig(ComposedConfig):
    """Settings of the based mixer."""

    feature_map: Any = part("feature_maps", TaylorConfig)
    normalize: bool = True


class Based(Composed):
    """See the module docstring."""

    Config = BasedConfig
