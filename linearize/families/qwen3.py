"""Qwen3: an RMS norm on every query and key head before the rotary embedding; head size independent of the width."""

from __future__ import annotations

from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, apply_rotary_pos_emb

from linearize.families.base import Family


class Qwen3(Family):
    """`model_type: qwen3`."""

    model_class = Qwen3ForCausalLM
    config_class = Qwen3Config
    attention_class = Qwen3Attention
    rotary = staticmethod(apply_rotary_pos_emb)
