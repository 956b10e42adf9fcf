"""Mixtral: Mistral's attention beside a mixture of experts, which is not touched."""

from __future__ import annotations

from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, apply_rotary_pos_emb

from linearize.families.base import Family


class Mixtral(Family):
    """`model_type: mixtral`."""

    model_class = MixtralForCausalLM
    config_class = MixtralConfig
    attention_class = MixtralAttention
    rotary = staticmethod(apply_rotary_pos_emb)
