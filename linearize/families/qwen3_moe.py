"""Qwen3-MoE: Qwen3's attention beside a mixture of experts, which is not touched."""

from __future__ import annotations

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, apply_rotary_pos_emb

from linearize.families.base import Family


class Qwen3Moe(Family):
    """`model_type: qwen3_moe`."""

    model_class = Qwen3MoeForCausalLM
    config_class = Qwen3MoeConfig
    attention_class = Qwen3MoeAttention
    rotary = staticmethod(apply_rotary_pos_emb)
