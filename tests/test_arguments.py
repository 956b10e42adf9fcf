"""The cache is read and given under the name that the installed transformers has for it, and never lost in silence."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from pico import KEYS, find_family, pico_model
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from linearize.arguments import CACHES, cache_of, continued


@pytest.mark.parametrize("family", KEYS)
@torch.no_grad()
def test_continued_goes_on_without_a_deprecated_name(family: str) -> None:
    """With a cache of its own, with the one that it returned, and through the base model alone."""
    model, ids = pico_model(family), torch.randint(2, 93, (2, 15), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        first = continued(model, None, input_ids=ids[:, :9])
        following = continued(model, cache_of(first), input_ids=ids[:, 9:])
        base = find_family(family).base_model(model)
        hidden = continued(base, cache_of(continued(base, None, input_ids=ids[:, :9])), input_ids=ids[:, 9:])
    assert cache_of(following) is cache_of(first) and cache_of(first).get_seq_length() == ids.shape[1]
    torch.testing.assert_close(following.logits, model(input_ids=ids).logits[:, 9:])
    torch.testing.assert_close(hidden.last_hidden_state, base(input_ids=ids).last_hidden_state[:, 9:])


@pytest.mark.parametrize("name", CACHES)
def test_continued_takes_the_name_of_the_forward(name: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def forward(self, input_ids, {name}=None, use_cache=None): return input_ids, {name}, use_cache", scope)
    made = type("Model", (), {"forward": scope["forward"], "__call__": scope["forward"]})
    cache = DynamicCache()
    assert continued(made(), cache, input_ids=3) == (3, cache, True)


def test_a_forward_with_another_name_is_refused() -> None:
    class Newer(torch.nn.Module):
        def forward(self, input_ids: Any, memory: Any = None, **kwargs: Any) -> Any: ...

    with pytest.raises(ValueError, match="Newer.forward takes input_ids, memory; a converted model needs one cache"):
        continued(Newer(), None)


def test_a_cache_that_cannot_be_told_is_refused() -> None:
    cache = DynamicCache()
    assert cache_of({"hidden_states": torch.zeros(1), "cache": None}) is None
    assert cache_of({"cache": cache, "past_key_values": cache, "layer_past": None}) is cache
    assert cache_of(CausalLMOutputWithPast(logits=torch.zeros(1))) is None
    for given, names in (
        ({"memory": cache}, "memory"),
        ({"memory": cache, "cache": None}, "memory"),
        ({"cache": DynamicCache(), "past_key_values": cache}, "cache and past_key_values"),
        ({"cache": DynamicCache(), "memory": cache}, "cache and memory"),
    ):
        with pytest.raises(ValueError, match=f"a cache is given as {names}; a converted model needs one cache, called"):
            cache_of(given)
