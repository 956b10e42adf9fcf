"""Gemma 3, text: a norm on every query and key head, its own scale, sliding windows with rotary angles of their own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, apply_rotary_pos_emb

from linearize.families.base import Family


class Gemma3Text(Family):
    """`model_type: gemma3_text`: Gemma 3 1B."""

    model_class = Gemma3ForCausalLM
    config_class = Gemma3TextConfig
    attention_class = Gemma3Attention
    rotary = staticmethod(apply_rotary_pos_emb)

    @classmethod
    def scale_queries(cls, attn: Any, made: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return made * factor[:, None, :, None]  # this q-norm sees [B, Hq, T, K]
