"""Gemma 3, text: a norm on every query and key head, sliding windows with a rotary embedding of their own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, apply_rotary_pos_emb

from linearize.families.base import Family, Heads


class Gemma3Text(Family):
    """`model_type: gemma3_text`; Gemma 3 1B, and the language tower of the larger ones."""

    model_class = Gemma3ForCausalLM
    config_class = Gemma3TextConfig
    attention_class = Gemma3Attention
    rotary = staticmethod(apply_rotary_pos_emb)

    @classmethod
    def scale(cls, config: Any, head_dim: int, layer: int) -> float:
        return config.query_pre_attn_scalar**-0.5

    @classmethod
    def project(cls, attn: Any, x: torch.Tensor) -> Heads:
        q, k, v = super().project(attn, x)
        return attn.q_norm(q), attn.k_norm(k), v

    @classmethod
    def scale_queries(cls, attn: Any, made: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return made * factor[:, None, :, None]  # this q-norm sees [B, Hq, T, K]
