"""Mixture of memories: Gated DeltaNet with several states and a router, so that facts do not overwrite each other.

Du et al. 2025, MoM (arXiv:2502.13685): each token goes to 2 of 4 memories and to one that all share. `update: {inner:
...}` takes any other update.

Departure: keys and values are the layer's for all memories, where the paper has projections for each. Traps: the
decoding state is five times Gated DeltaNet's; nothing balances the router.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.decays.scalar import ScalarConfig
from linearize.mixers.parts.output import OutputConfig
from linearize.mixers.parts.updates.memories import MemoriesConfig


@dataclass(frozen=True)
class MomConfig(ComposedConfig):
    """Settings of the mom mixer."""

    decay: Any = part("decays", ScalarConfig)
    update: Any = part("updates", MemoriesConfig)
    scale: Literal["none", "sqrt"] = "sqrt"
    rope: Literal["both", "window", "recurrent", "features", "none"] = "none"
    output: OutputConfig = field(default_factory=lambda: OutputConfig(norm="rms", gate="silu", scale=True))


class Mom(Composed):
    """See the module docstring."""

    Config = MomConfig
