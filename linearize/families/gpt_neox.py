"""GPT-NeoX and Pythia: one projection with q, k, v beside each other per head, rotary embedding on part of a head,
attention and MLP in parallel (untouched).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, apply_rotary_pos_emb

from linearize.families.base import Family, Heads


class GPTNeoX(Family):
    """`model_type: gpt_neox`."""

    model_class = GPTNeoXForCausalLM
    config_class = GPTNeoXConfig
    attention_class = GPTNeoXAttention
    rotary = staticmethod(apply_rotary_pos_emb)
    base = "gpt_neox"
    attention = "layers.{}.attention"
    lora_targets = {"q": "query_key_value", "k": "query_key_value", "v": "query_key_value", "o": "dense"}

    @classmethod
    def project(cls, attn: Any, x: torch.Tensor) -> Heads:
        q, k, v = attn.query_key_value(x).unflatten(-1, (-1, 3 * attn.head_size)).chunk(3, dim=-1)
        return q, k, v

    @classmethod
    def query_module(cls, attn: Any) -> nn.Module:
        return attn.query_key_value

    @classmethod
    def scale_queries(cls, attn: Any, made: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        q, k, v = made.unflatten(-1, (-1, 3, attn.head_size)).unbind(-2)
        return torch.stack([q * factor[..., None, None], k, v], dim=-2).flatten(-3)

    @classmethod
    def output_projection(cls, attn: Any) -> nn.Module:
        return attn.dense
