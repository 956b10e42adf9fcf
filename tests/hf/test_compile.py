"""torch.compile takes mixers, models and compiled generation whole, without a break in the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pico import small_mixer
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves
from transformers import CompileConfig, GenerationConfig, StaticCache

from linearize import registry
from linearize.arguments import cache_name, cache_of, continued
from linearize.hf.auto import find_class
from linearize.hf.cache import state_layer
from linearize.mixers.base import Mixer, config_from_dict
from linearize.swap import swapped
from linearize.testing.calls import inputs, new_mixer, run

TOKENS = 64


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Only so many compilations of the same code are kept."""
    torch.compiler.reset()
    counters.clear()


def prompt(batch: int = 2, tokens: int = TOKENS, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 93, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("key", registry.keys("mixers"))
@torch.no_grad()
def test_mixers_compile_without_graph_breaks(key: str) -> None:
    """A forward from no state, and a decoding step from the state that it leaves."""
    settings = {name: value for name, value in small_mixer(key).items() if name != "type"}
    cls = registry.find("mixers", key, Mixer)
    mixer = new_mixer(cls, config_from_dict(cls.Config, settings, find_class))
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    result = run(mixer, inputs(2, TOKENS))
    torch.testing.assert_close(tree_leaves(compiled(mixer, inputs(2, TOKENS))), tree_leaves(result))
    step = {"given": inputs(2, 1, seed=2), "state": result[1], "start": TOKENS}
    torch.testing.assert_close(tree_leaves(compiled(mixer, **step)), tree_leaves(run(mixer, **step)))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(("key", "layers"), [("lolcats", "LSL"), ("gdn", "LLL")])
@torch.no_grad()
def test_models_compile_without_graph_breaks(converted: Any, key: str, layers: str) -> None:
    """Padding is put in order, and the cache that a compiled model returns goes on where it left off."""
    model, more = converted(key, layers), prompt(2, 5, seed=2)
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :9] = 0
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found, expected = (m(prompt(), attention_mask=mask) for m in (compiled, model))
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(found.logits[mask.bool()], expected.logits[mask.bool()])
    longer = {"attention_mask": torch.nn.functional.pad(mask, (0, 5), value=1)}
    following, wanted = (continued(model, cache_of(x), input_ids=more, **longer).logits for x in (found, expected))
    torch.testing.assert_close(following, wanted)


def test_generation_records_no_cuda_graphs_of_states(converted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would overwrite the states that they returned. Without them, compiling is what the user asks for."""
    model = converted("gdn", "LSL")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    cache = StaticCache(config=model.config, max_cache_len=32)
    for mode, expected in ((None, True), ("default", True), ("reduce-overhead", False), ("max-autotune", False)):
        config = GenerationConfig(compile_config=CompileConfig(mode=mode))
        assert model._valid_auto_compile_criteria({cache_name(type(model)): cache}, config) == expected, mode
    assert not model._valid_auto_compile_criteria({cache_name(type(model)): cache}, GenerationConfig())


def test_drafted_decoding_is_not_compiled(converted: Any) -> None:
    """A state that records its past keeps what each step read."""
    model = converted("gdn", "LSL")
    config, cache = (
        GenerationConfig(compile_config=CompileConfig(mode=None)),
        StaticCache(model.config, max_cache_len=9),
    )
    config.compile_config._compile_all_devices = True
    for attn in swapped(model).values():
        state_layer(cache, attn.layer_idx)
    assert model._valid_auto_compile_criteria({cache_name(type(model)): cache}, config)
    cache.activate_past_recording()
    assert not model._valid_auto_compile_criteria({cache_name(type(model)): cache}, config)


@pytest.mark.parametrize(("key", "layers"), [("lolcats", "LSL"), ("gdn", "LLL")])
def test_compiled_generation_does_not_compile_every_step(converted: Any, key: str, layers: str) -> None:
    """With a static cache `generate` compiles the decoding step: at most once more as lengths turn out to vary, and
    once as a softmax layer's memory is there.
    """
    model, ids = converted(key, layers), prompt(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    eager = model.generate(ids, use_cache=False, **options)
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True  # by itself `generate` compiles on GPUs alone
    compiled = model.generate(ids, cache_implementation="static", compile_config=compile_config, **options)
    torch.testing.assert_close(compiled, eager)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3
