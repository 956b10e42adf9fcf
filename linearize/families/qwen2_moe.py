"""Qwen2-MoE: Qwen2's attention beside a mixture of experts, which is not touched."""

from __future__ import annotations

from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeAttention, apply_rotary_pos_emb

from linearize.families.base import Family


class Qwen2Moe(Family):
    """`model_type: qwen2_moe`."""

    model_class = Qwen2MoeForCausalLM
    config_class = Qwen2MoeConfig
    attention_class = Qwen2MoeAttention
    rotary = staticmethod(apply_rotary_pos_emb)
