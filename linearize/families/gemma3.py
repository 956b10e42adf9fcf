"""Gemma 3: a SigLIP vision tower in front of a Gemma 3 text model, whose masks the model around both makes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from linearize.families.base import VisionLanguage


class Gemma3(VisionLanguage):
    """`model_type: gemma3`: Gemma 3 4B, 12B and 27B."""

    model_class = Gemma3ForConditionalGeneration
    config_class = Gemma3Config
    outer = "model"

    @classmethod
    def concerns(cls, config: Any, swapped: Collection[int]) -> list[str]:
        images = "tokens of an image see each other in layers that keep softmax; a mixer reads images causally"
        return [*super().concerns(config, swapped), *([images] if swapped else [])]
