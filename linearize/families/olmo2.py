"""OLMo 2: norms over all queries and over all keys of a token at once; norms after attention untouched."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Olmo2Config, Olmo2ForCausalLM
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention, apply_rotary_pos_emb

from linearize.families.base import Family, Heads


class Olmo2(Family):
    """`model_type: olmo2`."""

    model_class = Olmo2ForCausalLM
    config_class = Olmo2Config
    attention_class = Olmo2Attention
    rotary = staticmethod(apply_rotary_pos_emb)

    @classmethod
    def project(cls, attn: Any, x: torch.Tensor) -> Heads:
        heads = (*x.shape[:2], -1, attn.head_dim)
        q, k = attn.q_norm(attn.q_proj(x)), attn.k_norm(attn.k_proj(x))
        return q.view(heads), k.view(heads), attn.v_proj(x).view(heads)
