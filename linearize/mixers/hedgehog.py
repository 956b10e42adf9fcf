"""Hedgehog: linear attention with learned softmax-mimicking feature maps and no window.

    y_t = sum_{i<=t} phi(q_t).phi(k_i) v_i / sum_{i<=t} phi(q_t).phi(k_i)

Zhang et al. 2024, "The Hedgehog & the Porcupine" (arXiv:2402.04347), equations 4 to 6; maps per query head, applied
after the rotary embedding, untied for queries and keys. Train them with attention-weight cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from linearize.inits.base import Init
from linearize.mixers.base import Backend, Context, HeadShape, Mixer, State
from linearize.mixers.parts.feature_maps import FeatureMapConfig, feature_map, map_inits
from linearize.ops.layout import expand_heads
from linearize.ops.linear import linear_attention, normalized


@dataclass(frozen=True)
class HedgehogConfig:
    """Settings of the hedgehog mixer."""

    __pydantic_config__ = {"extra": "forbid"}

    feature_map: FeatureMapConfig = field(default_factory=FeatureMapConfig)
    """The learned map, one for queries and one for keys, per query head."""
    chunk_size: int = 64
    """Tokens per chunk of the parallel form; changes speed, not results."""
    backend: Backend = "auto"
    """Which implementation of the recurrence runs; auto takes the fla kernels on GPUs that have them."""


class Hedgehog(Mixer):
    """See the module docstring. State: S [B, Hq, F, V] and z [B, Hq, F]."""

    Config = HedgehogConfig

    def __init__(self, config: HedgehogConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.map_q = feature_map(config.feature_map, shape.heads, shape.key_dim)
        self.map_k = feature_map(config.feature_map, shape.heads, shape.key_dim)

    def inits(self) -> dict[str, Init]:
        return map_inits(map_q=self.map_q, map_k=self.map_k)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        x: torch.Tensor,
        ctx: Context,
        state: State | None = None,
    ) -> tuple[torch.Tensor, State]:
        q, k = ctx.rotary(q, k)
        heads = self.shape.heads
        num, den, linear = linear_attention(
            self.map_q(q),
            self.map_k(expand_heads(k, heads)),
            expand_heads(v, heads),
            mask=ctx.mask,
            documents=ctx.documents,
            state=None if state is None else state["linear"],
            chunk_size=self.config.chunk_size,
            backend=self.config.backend,
        )
        return normalized(num, den).to(v.dtype), {"linear": linear}
