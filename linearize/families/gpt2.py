"""GPT-2: positions at the input, none in attention; one transposed projection (Conv1D); dropout on the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from linearize.families.base import Family, Heads


class GPT2(Family):
    """`model_type: gpt2`."""

    model_class = GPT2LMHeadModel
    config_class = GPT2Config
    attention_class = GPT2Attention
    base = "transformer"
    attention = "h.{}.attn"
    lora_targets = {"q": "c_attn", "k": "c_attn", "v": "c_attn", "o": "c_proj"}

    @classmethod
    def scale(cls, config: Any, head_dim: int, layer: int) -> float:
        scale = head_dim**-0.5 if config.scale_attn_weights else 1.0
        return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale

    @classmethod
    def project(cls, attn: Any, x: torch.Tensor) -> Heads:
        q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in attn.c_attn(x).split(attn.split_size, dim=-1))
        return q, k, v

    @classmethod
    def query_module(cls, attn: Any) -> nn.Module:
        return attn.c_attn

    @classmethod
    def scale_queries(cls, attn: Any, made: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        q, k, v = made.split(attn.split_size, dim=-1)
        return torch.cat([q * factor[..., None], k, v], dim=-1)

    @classmethod
    def output_projection(cls, attn: Any) -> nn.Module:
        return attn.c_proj

    @classmethod
    def output(cls, attn: Any, heads: torch.Tensor) -> torch.Tensor:
        return attn.resid_dropout(attn.c_proj(heads.contiguous()))  # Conv1D takes a view

    @classmethod
    def dropout(cls, config: Any) -> float:
        return config.attn_pdrop
