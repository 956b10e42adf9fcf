"""Mistral 3: a Pixtral vision tower in front of a Mistral."""

from __future__ import annotations

from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from linearize.families.base import VisionLanguage


class Mistral3(VisionLanguage):
    """`model_type: mistral3`: Mistral Small 3.1 and later."""

    model_class = Mistral3ForConditionalGeneration
    config_class = Mistral3Config
