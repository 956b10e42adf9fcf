"""LoLCATs: a softmax window and linear attention before it, under one shared denominator.

    y_t = (f * sum_win exp(s_ti - c_t) v_i + sum_before phi(q_t).phi(k_i) v_i)
        / (f * sum_win exp(s_ti - c_t)     + sum_before phi(q_t).phi(k_i)),   s_ti = scale * q_t.k_i

The window holds the last `window` tokens including t, c_t is the largest score in it, f = sigmoid(w) per head, and phi
is the hedgehog map after the rotary embedding. Zhang et al. 2024, LoLCATs (arXiv:2410.10254), equation 6 and appendix.
With `sinks` the first tokens of a document stay in the softmax and leave the linear sum; with `rope: window` phi reads
q and k before the rotary embedding. The defaults, sinks 0 and `rope: both`, are the paper's form.

Traps: trained at a short length, rotated features do harm beyond it (`rope: window` does not); a window alone scores
well on likelihood, so look at the loss with the linear branch off, and at recall.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.combines.shared_denominator import SharedDenominatorConfig
from linearize.mixers.parts.feature_maps.hedgehog import HedgehogConfig


@dataclass(frozen=True)
class LolcatsConfig(ComposedConfig):
    """Settings of the lolcats mixer."""

    feature_map: Any = part("feature_maps", HedgehogConfig)
    window: int = 64
    combine: Any = part("combines", SharedDenominatorConfig)


class Lolcats(Composed):
    """See the module docstring. State: the window's ring, S [B, Hq, F, V] and z [B, Hq, F]."""

    Config = LolcatsConfig
