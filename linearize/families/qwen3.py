"""Qwen3: an RMS norm on every query and key head before the rotary embedding; head size independent of the width."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, apply_rotary_pos_emb

from linearize.families.base import Family, Heads


class Qwen3(Family):
    """`model_type: qwen3`."""

    model_class = Qwen3ForCausalLM
    config_class = Qwen3Config
    attention_class = Qwen3Attention
    rotary = staticmethod(apply_rotary_pos_emb)

    @classmethod
    def project(cls, attn: Any, x: torch.Tensor) -> Heads:
        q, k, v = super().project(attn, x)
        return attn.q_norm(q), attn.k_norm(k), v
