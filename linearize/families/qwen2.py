"""Qwen2: biases on queries, keys and values; sliding windows in some layers where the config asks for them."""

from __future__ import annotations

from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, apply_rotary_pos_emb

from linearize.families.base import Family


class Qwen2(Family):
    """`model_type: qwen2`: Qwen 2 and 2.5, DeepSeek-R1-Distill-Qwen."""

    model_class = Qwen2ForCausalLM
    config_class = Qwen2Config
    attention_class = Qwen2Attention
    rotary = staticmethod(apply_rotary_pos_emb)
