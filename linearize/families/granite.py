"""Granite: Llama with its own scale of the logits; multipliers of embeddings and residuals untouched."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GraniteConfig, GraniteForCausalLM
from transformers.models.granite.modeling_granite import GraniteAttention, apply_rotary_pos_emb

from linearize.families.base import Family


class Granite(Family):
    """`model_type: granite`."""

    model_class = GraniteForCausalLM
    config_class = GraniteConfig
    attention_class = GraniteAttention
    rotary = staticmethod(apply_rotary_pos_emb)

    @classmethod
    def scale(cls, config: Any, head_dim: int, layer: int) -> float:
        return config.attention_multiplier

    @classmethod
    def logits(cls, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        return super().logits(model, hidden) / model.config.logits_scaling
