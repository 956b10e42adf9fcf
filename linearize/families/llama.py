"""Llama: grouped queries, rotary embedding on the whole head (any `rope_parameters`), optional biases, tied or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from linearize.families.base import Family
from linearize.mixers.base import HeadShape


class Llama(Family):
    """`model_type: llama`, which Llama 1 to 3.3, TinyLlama, SmolLM 1 and 2 and many others use."""

    model_class = LlamaForCausalLM
    config_class = LlamaConfig
    attention_class = LlamaAttention
    lora_targets = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}

    @staticmethod
    def base_model(model: Any) -> nn.Module:
        return model.model

    @staticmethod
    def attentions(model: Any) -> dict[str, nn.Module]:
        return {f"model.layers.{i}.self_attn": layer.self_attn for i, layer in enumerate(model.model.layers)}

    @staticmethod
    def shape(config: Any, layer: int) -> HeadShape:
        return HeadShape(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            key_dim=config.head_dim,
            value_dim=config.head_dim,
            hidden_size=config.hidden_size,
            scale=config.head_dim**-0.5,
        )

    @staticmethod
    def project(attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = (*x.shape[:2], -1, attn.head_dim)
        return attn.q_proj(x).view(heads), attn.k_proj(x).view(heads), attn.v_proj(x).view(heads)

    @staticmethod
    def query_module(attn: Any) -> nn.Module:
        return attn.q_proj

    @staticmethod
    def output_projection(attn: Any) -> nn.Module:
        return attn.o_proj

    @staticmethod
    def rotate(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
