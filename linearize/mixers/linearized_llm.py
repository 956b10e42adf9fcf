"""Linearized-LLM: softmax inside groups of tokens, linear attention over the groups before, a convolution of values.

    y_t = (f sum_group exp(s_ti - c_t) v_i + sum_before phi(q_t).phi(k_i) v_i) / (the same with v_i -> 1)
          + sum_j a_j v_{t-j},   j = 0 .. conv_size - 1

with s_ti = scale * q_t.k_i over the tokens i <= t of t's group, c_t the largest of them and f = sigmoid(w) per head.
Groups are `window` tokens at fixed positions; the linear sum holds all groups before. The convolution has one filter a
per key head, zero at first, so that it changes nothing; it belongs to no branch that can be switched off.

You et al. 2024, "When Linear Attention Meets Autoregressive Decoding" (arXiv:2406.07368). Departures: the release has
squared relu of normalised q.k inside groups and adds the branches; a converted model keeps the softmax it was trained
with, under one denominator, so that weights sum to one at the start of a group too, where the softmax sees a single
token and a sum would count both branches in full.

Trap: the released convolution is centred, 63 taps of which the later half is masked; its LLaMA layer applies the mask
once, when it is made, so training moves the masked taps and the future leaks in. Here later taps do not exist: 32 taps,
the current token's and 31 before it. A second trap: at the first tokens of a group all recent context is linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from linearize.inits.base import Constant, Init
from linearize.mixers.base import Context, HeadShape, State
from linearize.mixers.parts.blocks import BlockMixer, BlockMixerConfig
from linearize.ops.conv import causal_conv
from linearize.ops.layout import expand_heads, working_dtype


@dataclass(frozen=True)
class LinearizedLlmConfig(BlockMixerConfig):
    """Settings of the linearized_llm mixer."""

    conv_size: int = 32
    """Tokens that the convolution sees, the current one included; 0 for no convolution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.conv_size <= 128:
            raise ValueError(f"conv_size must lie between 0 and 128 tokens, got {self.conv_size}")


class LinearizedLlm(BlockMixer):
    """See the module docstring. State: the group so far, S, z, and the convolution's last conv_size - 1 values."""

    Config = LinearizedLlmConfig

    def __init__(self, config: LinearizedLlmConfig, shape: HeadShape):
        super().__init__(config, shape)
        if config.conv_size:
            self.taps = nn.Parameter(torch.empty(shape.kv_heads, 1, config.conv_size))

    def inits(self) -> dict[str, Init]:
        taps: dict[str, Init] = {"taps": Constant(0.0)} if self.config.conv_size else {}
        return {**super().inits(), **taps}

    def matrices(self, state: State) -> tuple[torch.Tensor, ...]:
        return super().matrices(state["groups"])

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        x: torch.Tensor,
        ctx: Context,
        state: State | None = None,
    ) -> tuple[torch.Tensor, State]:
        past = state or {}
        y, after = super().forward(q, k, v, x, ctx, past.get("groups"))
        if not self.config.conv_size:
            return y, {"groups": after}
        dtype = working_dtype(v)  # many taps add up
        near, conv = causal_conv(
            v.to(dtype), self.taps.to(dtype), mask=ctx.mask, documents=ctx.documents, state=past.get("conv")
        )
        return y + expand_heads(near, self.shape.heads).to(y.dtype), {"groups": after, "conv": conv}
