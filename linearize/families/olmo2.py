"""OLMo 2: norms over all queries and over all keys of a token at once; norms after attention untouched."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Olmo2Config, Olmo2ForCausalLM
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention, apply_rotary_pos_emb

from linearize.families.base import Family


class Olmo2(Family):
    """`model_type: olmo2`."""

    model_class = Olmo2ForCausalLM
    config_class = Olmo2Config
    attention_class = Olmo2Attention
    rotary = staticmethod(apply_rotary_pos_emb)

    @classmethod
    def normed(cls, attn: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return attn.q_norm(q.flatten(2)).view_as(q), attn.k_norm(k.flatten(2)).view_as(k)
