"""Pico models of every family: three layers of width 32, made on the spot.

`pico_config(key)` needs no entry here for a new family; `MORE` adds what makes one interesting, such as sliding windows
or layers without rotary embedding.
"""

from __future__ import annotations

from typing import Any

import torch

from linearize import registry
from linearize.families.base import Family

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that greedy choices are not decided by rounding
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "head_dim": 8,
}
"""What means the same in every family."""

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SLIDING = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_UNGROUPED = {"num_key_value_heads": None, "head_dim": None}
_CLIP = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
_CLIP |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16}
_SIGLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIGLIP |= {"image_size": 8, "patch_size": 4}
_PIXTRAL = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
_PIXTRAL |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4, "head_dim": 8}
_QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
_QWEN_VISION |= {"patch_size": 4, "window_size": 8, "fullatt_block_indexes": [0]}
MORE: dict[str, dict[str, Any]] = {
    "gemma2": {**_SLIDING, "query_pre_attn_scalar": 16},
    "gemma3": {
        "text_config": {**_SLIDING, "query_pre_attn_scalar": 16},
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": 96,
        "boi_token_index": 95,
        "eoi_token_index": 94,
    },
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 16},
    "gpt2": _UNGROUPED,
    "gpt_neox": _UNGROUPED,
    "granite": {"attention_multiplier": 0.3},
    "llava": {"text_config": {"model_type": "llama"}, "vision_config": _CLIP, "image_token_index": 96},
    "mistral3": {"text_config": {"model_type": "mistral"}, "vision_config": _PIXTRAL, "image_token_index": 96},
    "mistral": {"sliding_window": 12},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "qwen2": {**_SLIDING, "use_sliding_window": True},
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
        "vision_config": _QWEN_VISION,
        "image_token_id": 96,
        "video_token_id": 95,
        "vision_start_token_id": 94,
        "vision_end_token_id": 93,
    },
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": _EXPERTS,
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}
"""What differs, by family."""


KEYS = tuple(key for key in registry.keys("families") if registry.find("families", key, Family).causal)
"""Decoders."""
ENCODERS = tuple(key for key in registry.keys("families") if key not in KEYS)
PRESETS = ("lolcats", "liger", "gdn")
"""Mixers that stand for all others where a family is tested: a window, a gate from the keys, a delta rule."""


def cases(layouts: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """(family, mixer, layers): all mixers on llama, and the presets on every other family with and without softmax."""
    llama = [("llama", mixer, layers) for mixer in registry.keys("mixers") for layers in layouts]
    rest = [(key, mixer, layers) for key in KEYS if key != "llama" for mixer in PRESETS for layers in layouts[:2]]
    return llama + rest


def find_family(key: str) -> type[Family]:
    return registry.find("families", key, Family)


def pico_config(key: str, **overrides: Any) -> Any:
    """A configuration of the family `key`; sizes are those of its language model."""
    more = MORE.get(key, {})
    sizes = {**SIZES, **more.get("text_config", more), **overrides}
    config_class = find_family(key).config_class
    return config_class(**{**more, "text_config": sizes}) if "text_config" in more else config_class(**sizes)


def pico_model(key: str, seed: int = 0, **overrides: Any) -> Any:
    """A randomly initialised model of the family `key`, float32, eval mode; what begins as zeros, norms and biases are
    random as well.
    """
    torch.manual_seed(seed)
    model = find_family(key).model_class(pico_config(key, **overrides)).eval()
    noise = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=noise)
    return model


def small_mixer(key: str) -> dict[str, Any]:
    """The description of mixer `key` with a window of 8 and chunks of 16 tokens, where it has them."""
    import dataclasses

    from linearize import registry
    from linearize.mixers.base import Mixer

    defaults = dataclasses.asdict(registry.find("mixers", key, Mixer).Config())
    small = {"window": 8, "chunk_size": 16}
    return {"type": key, **{name: value for name, value in small.items() if defaults.get(name)}}
