"""SmolLM3: some layers have no rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
from transformers import SmolLM3Config, SmolLM3ForCausalLM
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention, apply_rotary_pos_emb

from linearize.families.base import Family


class SmolLM3(Family):
    """`model_type: smollm3`."""

    model_class = SmolLM3ForCausalLM
    config_class = SmolLM3Config
    attention_class = SmolLM3Attention
    rotary = staticmethod(apply_rotary_pos_emb)

    @classmethod
    def rotate(cls, attn: Any, q: torch.Tensor, k: torch.Tensor, position: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return super().rotate(attn, q, k, position) if attn.use_rope else (q, k)
