"""What mixers share that attend inside blocks at fixed positions and hold what lies before them in a linear sum.

`BlockMixer` is everything but the choice of the blocks in reach: `back` and `bank` of `linearize.ops.block_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from linearize.inits.base import Init
from linearize.mixers.base import Context, HeadShape, Mixer, State
from linearize.mixers.parts.base import Calibration, build, calibrate_parts, part, part_inits
from linearize.mixers.parts.combines.base import Combine, Memory, Window
from linearize.mixers.parts.combines.shared_denominator import SharedDenominatorConfig
from linearize.mixers.parts.feature_maps.base import FeatureMap
from linearize.mixers.parts.feature_maps.hedgehog import HedgehogConfig
from linearize.ops.block_attention import Read, block_attention
from linearize.ops.linear import normalized


@dataclass(frozen=True)
class BlockMixerConfig:
    """Settings that all of them have."""

    __pydantic_config__ = {"extra": "forbid"}

    feature_map: Any = part("feature_maps", HedgehogConfig)
    """phi, of queries and of keys, each with parameters of its own."""
    window: int = 64
    """Tokens in a block, at fixed positions: block n holds the tokens n * window and following."""
    combine: Any = part("combines", SharedDenominatorConfig)
    """How softmax and linear branch become one output."""
    rope: Literal["both", "window", "none"] = "both"
    """Which branches see the rotary embedding. Without it the linear branch works at lengths it was not trained on."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1 token, got {self.window}")


class BlockMixer(Mixer):
    """See the module docstring. State: what `block_attention` returns."""

    branches = ("window", "linear")

    back: ClassVar[int] = 0
    """Whole blocks before the query's own that the softmax sees."""

    def __init__(self, config: Any, shape: HeadShape):
        super().__init__(config, shape)
        self.map_q: FeatureMap = build(config.feature_map, shape)
        self.map_k: FeatureMap = build(config.feature_map, shape)
        self.combine: Combine = build(config.combine, shape)
        if not self.map_q.non_negative:
            raise ValueError(
                "a denominator needs weights that are never negative, which feature_map "
                f"{config.feature_map.type!r} does not give; take a map such as hedgehog"
            )

    @property
    def bank(self) -> int:
        """Tokens from before the blocks in reach that the softmax sees."""
        return 0

    def inits(self) -> dict[str, Init]:
        return part_inits(self)

    @property
    def exact(self) -> int:
        return self.config.window

    def matrices(self, state: State) -> tuple[torch.Tensor, ...]:
        return (state["S"],)

    def calibrate(self, measured: Calibration) -> None:
        """Set what the parts can set from the teacher's attention."""
        calibrate_parts(self, measured)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        x: torch.Tensor,
        ctx: Context,
        state: State | None = None,
    ) -> tuple[torch.Tensor, State]:
        rope = self.config.rope
        q_turned, k_turned = (q, k) if rope == "none" else ctx.rotary(q, k)
        read, after = block_attention(
            q_turned,
            k_turned,
            v,
            self.map_q(q if rope == "window" else q_turned),
            self.map_k,
            block=self.config.window,
            back=self.back,
            bank=self.bank,
            scale=self.shape.scale,
            softcap=self.shape.softcap,
            linear_k=k if rope == "window" else None,
            mask=ctx.mask,
            documents=ctx.documents,
            state=state,
        )
        return self._join(read, x).to(v.dtype), after

    def _join(self, read: Read, x: torch.Tensor) -> torch.Tensor:
        if "linear" in self.disabled:
            return read.out
        memory = Memory(read.num, read.den)
        alone = "window" in self.disabled
        if alone or not self.combine.shares_denominator:
            memory = Memory(normalized(read.num, read.den), None)
        return memory.out if alone else self.combine(Window(read.out, read.lse, read.peak), memory, x)
