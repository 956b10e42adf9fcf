"""`generate` on converted models equals a run without any cache, for every mixer and with softmax layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pico import cases
from transformers import DynamicCache, StaticCache

from linearize import registry
from linearize.arguments import cache_name, cache_of, continued
from linearize.hf.cache import StateLayer, state_layer

LONG, NEW = 21, 14  # the prompt and the continuation both cross the window of 8

every_mixer = pytest.mark.parametrize("key", registry.keys("mixers"))
every_case = pytest.mark.parametrize(("family", "key", "layers"), cases(("LLL", "LSL", "SLL")))


def prompt(batch: int = 1, tokens: int = LONG, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options)


def state_layers(cache: Any) -> list[StateLayer]:
    return [layer for layer in cache.layers if isinstance(layer, StateLayer)]


@every_case
def test_greedy_sampling_and_beams_equal_no_cache(converted: Any, family: str, key: str, layers: str) -> None:
    model, ids = converted(key, layers, family=family), prompt(2)
    for options in (
        {},
        {"do_sample": True, "temperature": 1.3, "top_k": 20},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 3},
    ):
        cached = generate(model, ids, **options)
        assert cached.shape[1] == LONG + NEW
        torch.testing.assert_close(cached, generate(model, ids, use_cache=False, **options), msg=str(options))


@every_case
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_rows_alone(converted: Any, family: str, key: str, layers: str, side: str) -> None:
    model, lengths = converted(key, layers, family=family), (LONG, 5, 1, 13)
    ids = torch.ones(len(lengths), LONG, dtype=torch.long)
    mask = torch.zeros_like(ids)
    rows = [prompt(1, n, seed=n)[0] for n in lengths]
    for row, (tokens, n) in enumerate(zip(rows, lengths, strict=True)):
        where = slice(LONG - n, None) if side == "left" else slice(0, n)
        ids[row, where], mask[row, where] = tokens, 1
    if side == "right":  # Hugging Face generates from left-padded prompts only; a forward takes both
        logits = model(ids, attention_mask=mask).logits
        for row, (tokens, n) in enumerate(zip(rows, lengths, strict=True)):
            torch.testing.assert_close(logits[row, :n], model(tokens[None]).logits[0], atol=1e-4, rtol=1e-4)
        return
    batch = generate(model, ids, mask)
    for row, tokens in enumerate(rows):
        alone = generate(model, tokens[None], use_cache=False)[0, len(tokens) :]
        torch.testing.assert_close(batch[row, LONG:], alone, msg=f"row of {len(tokens)} tokens")


@every_case
def test_continue_from_cache(converted: Any, family: str, key: str, layers: str) -> None:
    model = converted(key, layers, family=family)
    first = generate(model, prompt(2), return_dict_in_generate=True)
    longer = torch.cat([first.sequences, prompt(2, 9, seed=5)], dim=1)
    second = generate(model, longer, **{cache_name(type(model)): cache_of(first)})
    torch.testing.assert_close(second, generate(model, longer, use_cache=False))


@every_case
@pytest.mark.parametrize("options", [{"prefill_chunk_size": 6}, {"cache_implementation": "static"}], ids=str)
def test_other_ways_to_fill_a_cache(
    converted: Any, family: str, key: str, layers: str, options: dict[str, Any]
) -> None:
    model, ids = converted(key, layers, family=family), prompt(2)
    torch.testing.assert_close(generate(model, ids, **options), generate(model, ids, use_cache=False))


@every_mixer
def test_state_size_does_not_depend_on_length(converted: Any, key: str) -> None:
    model = converted(key, "LSL")
    with torch.no_grad():
        cache = cache_of(model(prompt(2, 1), use_cache=True))
        sizes = {tuple(layer.nbytes() for layer in state_layers(cache))}
        for tokens in (1, 3, 40, 1):
            cache = cache_of(continued(model, cache, input_ids=prompt(2, tokens)))
            sizes.add(tuple(layer.nbytes() for layer in state_layers(cache)))
    assert len(sizes) == 1 and min(next(iter(sizes))) > 0
    assert [isinstance(layer, StateLayer) for layer in cache.layers] == [True, False, True]
    assert cache.get_seq_length() == 46


def test_a_softmax_layer_sizes_the_masks(pico_config: Any) -> None:
    cache = StaticCache(config=pico_config(), max_cache_len=40)
    assert state_layer(cache, 0).get_mask_sizes(5) == cache.layers[1].get_mask_sizes(5) == (40, 0)
    for index in (1, 2):
        state_layer(cache, index)
    assert cache.layers[0].get_mask_sizes(5) == (5, 0)


def test_a_filled_softmax_cache_is_not_replaced(pico_model: Any, converted: Any) -> None:
    cache = DynamicCache(config=pico_model().config)
    continued(pico_model(), cache, input_ids=prompt())
    with pytest.raises(ValueError, match="layer 0 already holds 21 tokens of a softmax layer"):
        continued(converted(registry.keys("mixers")[0]), cache, input_ids=prompt())
