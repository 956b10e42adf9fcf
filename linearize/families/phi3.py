"""Phi-3: queries, keys and values from one projection, in that order; the rotary embedding may turn part of a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3Attention, apply_rotary_pos_emb

from linearize.families.base import Family, Heads


class Phi3(Family):
    """`model_type: phi3`: Phi-3, Phi-3.5 and Phi-4."""

    model_class = Phi3ForCausalLM
    config_class = Phi3Config
    attention_class = Phi3Attention
    rotary = staticmethod(apply_rotary_pos_emb)
    lora_targets = {"q": "qkv_proj", "k": "qkv_proj", "v": "qkv_proj", "o": "o_proj"}

    @classmethod
    def project(cls, attn: Any, x: torch.Tensor) -> Heads:
        size, keys = attn.head_dim, attn.num_key_value_heads * attn.head_dim
        made = attn.qkv_proj(x)
        parts = made.split([made.shape[-1] - 2 * keys, keys, keys], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, size)) for part in parts)
        return q, k, v

    @classmethod
    def query_module(cls, attn: Any) -> nn.Module:
        return attn.qkv_proj

    @classmethod
    def scale_queries(cls, attn: Any, made: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        keys = 2 * attn.num_key_value_heads * attn.head_dim
        q, rest = made.split([made.shape[-1] - keys, keys], dim=-1)
        return torch.cat([q * factor[..., None], rest], dim=-1)
