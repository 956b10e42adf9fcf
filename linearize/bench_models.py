"""Models to time without a download: random weights in the shape of a known model, every layer swapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from linearize.errors import UserError, did_you_mean
from linearize.hf.auto import linearized
from linearize.swap import swapped

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
"""Configurations that `random_model` knows by name."""


def random_model(
    shape: str,
    mixer: str | dict[str, Any],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Any:
    """A model with random weights, made on `device`, with every layer swapped.

    Args:
        shape: a name in `SHAPES`, or a folder or config.json of any supported family.
        mixer: recipe key of the mixer, or its settings with `type`.

    Raises:
        UserError: for an unknown shape, family or mixer.
    """
    config = _shape_config(shape)
    settings = {"type": mixer} if isinstance(mixer, str) else dict(mixer)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        linearized(model, {"mixers": [settings], "layers": [0] * config.get_text_config().num_hidden_layers})
    for name, attention in swapped(model).items():
        attention.mixer.initialise(f"{name}.mixer", seed)
    return model.eval()


def _shape_config(shape: str) -> Any:
    if shape in SHAPES:
        return AutoConfig.for_model(**SHAPES[shape])
    if not Path(shape).exists():
        raise UserError(f"unknown shape {shape!r}{did_you_mean(shape, SHAPES)}; or give a folder or config.json")
    return AutoConfig.from_pretrained(shape)
