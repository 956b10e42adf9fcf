"""LoLCATs: a softmax window and linear attention before it, under one shared denominator.

    y_t = (g * sum_win exp(s_ti - c_t) v_i + sum_before phi(q_t).phi(k_i) v_i)
        / (g * sum_win exp(s_ti - c_t)     + sum_before phi(q_t).phi(k_i)),   s_ti = scale * q_t.k_i

The window holds the last `window` tokens including t, c_t is the largest score in it, g = sigmoid(w) per head, and phi
is the hedgehog map after the rotary embedding. Zhang et al. 2024, LoLCATs (arXiv:2410.10254), equation 6 and appendix.
With `sinks` the first tokens of a document stay in the softmax and leave the linear sum; with `rope: window` phi reads
q and k before the rotary embedding. The defaults, sinks 0 and `rope: both`, are the paper's form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from linearize.inits.base import Constant, Init
from linearize.mixers.base import Backend, Context, HeadShape, Mixer, State
from linearize.mixers.parts.feature_maps import FeatureMapConfig, feature_map, map_inits
from linearize.mixers.parts.window import check_window
from linearize.ops.layout import expand_heads
from linearize.ops.linear import linear_attention, normalized
from linearize.ops.window import leaving, window_attention


@dataclass(frozen=True)
class LolcatsConfig:
    """Settings of the lolcats mixer."""

    __pydantic_config__ = {"extra": "forbid"}

    window: int = 64
    """Tokens of exact softmax attention, the current one included."""
    sinks: int = 0
    """First tokens of a document that stay in the softmax at any distance."""
    feature_map: FeatureMapConfig = field(default_factory=FeatureMapConfig)
    """The learned map, one for queries and one for keys, per query head."""
    window_factor: float = 0.1
    """First value of g, the weight of the window against the linear sum; between 0 and 1."""
    rope: Literal["both", "window"] = "both"
    """Which branches see the rotary embedding. Without it the linear sum works at lengths it was not trained on."""
    chunk_size: int = 64
    """Tokens per chunk of the parallel form; changes speed, not results."""
    backend: Backend = "auto"
    """Which implementation of the recurrence runs; auto takes the fla kernels on GPUs that have them."""

    def __post_init__(self) -> None:
        check_window("lolcats", self.window, self.sinks)
        if not 0 < self.window_factor < 1:
            raise ValueError(f"lolcats: window_factor must lie between 0 and 1, got {self.window_factor}")


class Lolcats(Mixer):
    """See the module docstring. State: the window's ring of keys and values, S [B, Hq, F, V] and z [B, Hq, F]."""

    Config = LolcatsConfig
    branches = ("window", "linear")

    def __init__(self, config: LolcatsConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.map_q = feature_map(config.feature_map, shape.heads, shape.key_dim)
        self.map_k = feature_map(config.feature_map, shape.heads, shape.key_dim)
        self.window_factor = nn.Parameter(torch.empty(shape.heads))

    def inits(self) -> dict[str, Init]:
        factor = self.config.window_factor
        start = Constant(math.log(factor / (1 - factor)))
        return {**map_inits(map_q=self.map_q, map_k=self.map_k), "window_factor": start}

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        x: torch.Tensor,
        ctx: Context,
        state: State | None = None,
    ) -> tuple[torch.Tensor, State]:
        config, heads = self.config, self.shape.heads
        past = state or {"window": None, "linear": None}
        bare_q, bare_k = q, k
        q, k = ctx.rotary(q, k)
        bare = config.rope == "window"
        # The ring holds rotated keys; bare ones travel through it beside the values.
        carried = torch.cat([v, bare_k.to(v.dtype)], dim=-1) if bare else v
        local = {"window": config.window, "sinks": config.sinks, "mask": ctx.mask, "documents": ctx.documents}
        k_old, v_old, valid = leaving(k, carried, state=past["window"], **local)
        out, lse, peak, window_state = window_attention(
            q, k, carried, scale=self.shape.scale, state=past["window"], return_max=True, **local
        )
        if bare:
            q, values = bare_q, v.shape[-1]
            out, v_old, k_old = out[..., :values], v_old[..., :values], v_old[..., values:]
        keys = self.map_k(expand_heads(k_old, heads)) * valid[:, :, None, None]
        num, den, linear_state = linear_attention(
            self.map_q(q),
            keys,
            expand_heads(v_old, heads),
            mask=ctx.mask,
            documents=ctx.documents,
            state=past["linear"],
            chunk_size=config.chunk_size,
            backend=config.backend,
        )
        after = {"window": window_state, "linear": linear_state}
        if "linear" in self.disabled:
            return out, after
        if "window" in self.disabled:
            return normalized(num, den).to(v.dtype), after
        weight = self.window_factor.to(lse.dtype).sigmoid() * (lse - peak).exp()  # [B, T, Hq], the window's share
        y = (weight[..., None] * out + num) / (weight + den)[..., None]
        return y.to(v.dtype), after
