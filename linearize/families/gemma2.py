"""Gemma 2: capped logits, a scale of its own, a sliding window in every other layer; norms untouched."""

from __future__ import annotations

from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, apply_rotary_pos_emb

from linearize.families.base import Family


class Gemma2(Family):
    """`model_type: gemma2`."""

    model_class = Gemma2ForCausalLM
    config_class = Gemma2Config
    attention_class = Gemma2Attention
    rotary = staticmethod(apply_rotary_pos_emb)
