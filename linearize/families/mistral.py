"""Mistral: Llama with a sliding window in all layers, in the first release."""

from __future__ import annotations

from transformers import MistralConfig, MistralForCausalLM
from transformers.models.mistral.modeling_mistral import MistralAttention, apply_rotary_pos_emb

from linearize.families.base import Family


class Mistral(Family):
    """`model_type: mistral`: Mistral 7B, Nemo, Small."""

    model_class = MistralForCausalLM
    config_class = MistralConfig
    attention_class = MistralAttention
    rotary = staticmethod(apply_rotary_pos_emb)
