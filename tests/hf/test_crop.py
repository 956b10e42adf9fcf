"""A state layer that records its past can drop its last tokens: assisted and prompt-lookup decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from linearize import registry
from linearize.arguments import cache_of, continued
from linearize.hf.cache import StateLayer, state_layer
from linearize.swap import swapped

every_mixer = pytest.mark.parametrize("key", registry.keys("mixers"))
every_layout = pytest.mark.parametrize("layers", ["LLL", "LSL", "SLL"])


def prompt(batch: int = 1, tokens: int = 21, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


@every_mixer
@every_layout
def test_prompt_lookup_rolls_back(converted: Any, key: str, layers: str) -> None:
    model, ids = converted(key, layers), prompt(1, 7).repeat(1, 3)  # repeats, so that lookups find candidates
    torch.testing.assert_close(generate(model, ids, prompt_lookup_num_tokens=4), generate(model, ids, use_cache=False))


@every_mixer
def test_assisted_by_a_converted_model(converted: Any, key: str) -> None:
    model, ids = converted(key), prompt(1)
    # The same model drafts, then one that mostly disagrees: all tokens accepted, and many rolled back.
    for assistant in (converted(key), converted(key, seed=1)):
        torch.testing.assert_close(
            generate(model, ids, assistant_model=assistant), generate(model, ids, use_cache=False)
        )


@every_mixer
@every_layout
@pytest.mark.parametrize("removed", [1, 6, 10, 17])  # inside the last call, all of it, and into the padded one before
@torch.no_grad()
def test_crop_equals_never_having_seen_them(converted: Any, key: str, layers: str, removed: int) -> None:
    model, ids, more = converted(key, layers), prompt(3, 30), prompt(3, 5, seed=2)
    mask = torch.ones(3, 35, dtype=torch.long)
    mask[0, :9] = 0
    mask[1, :2] = 0

    def after(ids: torch.Tensor, cache: Any) -> torch.Tensor:
        past = cache.get_seq_length()
        mask_so_far = mask[:, : past + ids.shape[1]]
        positions = (mask_so_far.cumsum(1) - 1).clamp(min=0)[:, past:]
        return continued(model, cache, input_ids=ids, attention_mask=mask_so_far, position_ids=positions).logits

    cache = DynamicCache(config=model.config)
    for attn in swapped(model).values():
        state_layer(cache, attn.layer_idx)
    cache.activate_past_recording()
    after(ids[:, :20], cache)
    after(ids[:, 20:], cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == 30 - removed
    plain = DynamicCache(config=model.config)
    after(ids[:, : 30 - removed], plain)
    torch.testing.assert_close(after(more, cache), after(more, plain), atol=1e-4, rtol=1e-4)


def test_crop_without_a_record_is_an_error(converted: Any) -> None:
    cache = cache_of(converted(registry.keys("mixers")[0])(prompt(), use_cache=True))
    with pytest.raises(NotImplementedError, match=r"its past was not recorded; call `cache.activate_past_recording"):
        cache.crop(-1)


def test_a_state_says_whether_it_can_be_cropped() -> None:
    """transformers 5.24 refuses to decode with an assistant where a layer says no after the prompt."""
    layer = StateLayer()
    assert not layer.is_croppable
    layer.activate_past_recording()
    assert layer.is_croppable
