"""Qwen2.5-VL: Qwen2's attention, with rotary angles that are mixed from time, height and width before attention sees
them. The vision tower is not touched.
"""

from __future__ import annotations

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention, apply_rotary_pos_emb

from linearize.families.base import Family


class Qwen25VL(Family):
    """`model_type: qwen2_5_vl`."""

    model_class = Qwen2_5_VLForConditionalGeneration
    config_class = Qwen2_5_VLConfig
    attention_class = Qwen2_5_VLAttention
    rotary = staticmethod(apply_rotary_pos_emb)
    auto_class = "AutoModelForImageTextToText"
    base = "model.language_model"
    tells_positions = False

    @classmethod
    def packed_positions(cls, positions: torch.Tensor) -> torch.Tensor:
        """[4, B or 1, T]: the text's own, which masks are made of, before those of time, height and width."""
        return positions.expand(4, *positions.shape)
