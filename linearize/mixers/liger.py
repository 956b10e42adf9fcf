"""Liger: gated linear attention whose gate is built from the keys, averaged with a softmax window; no new parameters.

    g_t = logsigmoid(k_t) / 16        S_t = diag(exp g_t) S_{t-1} + softmax(k_t) v_t^T
    y_t = (1 - mix) * softmax(q_t) S_t + mix * window_attention_t

Lan et al. 2025, Liger (arXiv:2503.01496), equations 7 to 10, GLA form, where the paper's pooling is the identity. Only
the window uses the rotary embedding. The gate reads k after any k-norm and before the rotary embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from linearize.mixers.base import Backend, Context, Mixer, State
from linearize.mixers.parts.window import check_window
from linearize.ops.gla import gla
from linearize.ops.layout import working_dtype
from linearize.ops.window import window_attention


@dataclass(frozen=True)
class LigerConfig:
    """Settings of the liger mixer."""

    __pydantic_config__ = {"extra": "forbid"}

    window: int = 64
    """Tokens of exact softmax attention, the current one included."""
    sinks: int = 0
    """First tokens of a document that stay in the softmax at any distance."""
    mix: float = 0.5
    """Weight of the window; the recurrent branch gets the rest."""
    gate_normalizer: float = 16.0
    """Divisor of the log-gate; larger forgets more slowly."""
    chunk_size: int = 64
    """Tokens per chunk of the parallel form; changes speed, not results."""
    backend: Backend = "auto"
    """Which implementation of the recurrence runs; auto takes the fla kernels on GPUs that have them."""

    def __post_init__(self) -> None:
        check_window("liger", self.window, self.sinks)
        if not 0 <= self.mix <= 1:
            raise ValueError(f"liger: mix must lie between 0 and 1, got {self.mix}")
        if self.gate_normalizer <= 0:
            raise ValueError(f"liger: gate_normalizer must be positive, got {self.gate_normalizer}")


class Liger(Mixer):
    """See the module docstring. State: the window's ring of keys and values, and S [B, Hq, K, V]."""

    Config = LigerConfig
    branches = ("window", "linear")

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        x: torch.Tensor,
        ctx: Context,
        state: State | None = None,
    ) -> tuple[torch.Tensor, State]:
        config = self.config
        past = state or {"window": None, "linear": None}
        recurrent, linear_state = gla(
            q.softmax(-1),
            k.softmax(-1),
            v,
            F.logsigmoid(k.to(working_dtype(k))) / config.gate_normalizer,
            scale=1.0,
            mask=ctx.mask,
            documents=ctx.documents,
            state=past["linear"],
            chunk_size=config.chunk_size,
            backend=config.backend,
        )
        q, k = ctx.rotary(q, k)
        local, _, window_state = window_attention(
            q,
            k,
            v,
            window=config.window,
            sinks=config.sinks,
            scale=self.shape.scale,
            mask=ctx.mask,
            documents=ctx.documents,
            state=past["window"],
        )
        after = {"window": window_state, "linear": linear_state}
        if "linear" in self.disabled:
            return local, after
        if "window" in self.disabled:
            return recurrent, after
        return config.mix * local + (1 - config.mix) * recurrent, after
