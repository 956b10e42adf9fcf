"""Llama: grouped queries, rotary embedding on the whole head (any `rope_parameters`), optional biases, tied or not."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from linearize.families.base import Family


class Llama(Family):
    """`model_type: llama`, which Llama 1 to 3.3, TinyLlama, SmolLM 1 and 2 and many others use."""

    model_class = LlamaForCausalLM
    config_class = LlamaConfig
    attention_class = LlamaAttention
    rotary = staticmethod(apply_rotary_pos_emb)
