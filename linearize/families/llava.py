"""LLaVA: a CLIP vision tower in front of a language model of another family."""

from __future__ import annotations

from transformers import LlavaConfig, LlavaForConditionalGeneration

from linearize.families.base import VisionLanguage


class Llava(VisionLanguage):
    """`model_type: llava`: LLaVA 1.5, Pixtral."""

    model_class = LlavaForConditionalGeneration
    config_class = LlavaConfig
