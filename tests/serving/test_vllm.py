"""The plugin of vLLM, as far as it needs no vLLM: who calls it, what is supported, states, names, shards.

Its two modules that import vLLM are not tested here; docs/serving.md says how they were.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from paged_cases import KERNEL, settings_of
from safetensors.torch import load_file

from linearize import registry
from linearize.arguments import cache_of
from linearize.errors import UserError
from linearize.hf.export import export
from linearize.natives.base import conversion
from linearize.registry import family_of
from linearize.serving import vllm
from linearize.serving.vllm.layout import (
    FAMILIES,
    adapt,
    full_mixer,
    local_shape,
    place,
    shard,
    state_dtypes,
    states,
)
from linearize.serving.vllm.support import kernel, supported

NO_WINDOW: dict[str, Any] = {
    "mistral": {"sliding_window": None},
    "qwen2": {"layer_types": None, "sliding_window": None},
}
every_mixer = pytest.mark.parametrize("key", KERNEL)


# Who calls it


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_registering_without_vllm_is_harmless_and_loads_nothing() -> None:
    script = (
        "import sys; from linearize.serving.vllm import register; register(); register()\n"
        "print([name for name in ('vllm', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("version", ["0.32.9", "0.34.0", "1.0"])
def test_versions_it_was_not_written_against_get_a_warning(version: str, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    vllm.register()
    assert f"this is {version}" in caplog.text and "install vllm==0.33.*" in caplog.text


def test_versions_it_was_written_against() -> None:
    assert all(map(vllm.known, ("0.33.0", "0.33.2.post1", "0.33.1rc1+cpu")))


# What is supported


@pytest.mark.parametrize("key", registry.keys("mixers"))
def test_every_mixer_is_supported_or_has_reasons(converted: Any, key: str) -> None:
    reason = supported(converted(key, "LS").config)
    assert (reason is None) == (key in KERNEL), reason
    if reason is None:
        assert kernel(settings_of(key)[1]) == KERNEL[key]
    else:
        assert "vLLM cannot run this model: " in reason and "`linearize serve`" in reason


@pytest.mark.parametrize(
    "key, settings, words",
    [
        ("gdn", {"window": 8}, r"mixer.window is 8: .*set it to 0"),
        ("gdn", {"conv": {"size": 5}}, r"mixer.conv.size is 5: .* 2 to 4 tokens"),
        ("gdn", {"feature_map": {"type": "taylor", "dim": 32}}, r"keys have \d+ features, .* at most 256"),
        ("gla", {}, "no kernel for a sum .update additive. with decay low_rank"),
        ("mamba2", {"decay": {"write": False}}, "with decay scalar without write"),
        ("rwkv7", {}, "mixer.update is rwkv7"),
        ("t2r", {}, "mixer.normalize is true"),
        ("still", {}, "mixer Still is not made of parts"),
    ],
)
def test_reasons_name_the_setting(converted: Any, key: str, settings: Any, words: str) -> None:
    assert re.search(words, str(supported(converted(key, "LS", settings=settings).config)))


def test_reasons_of_the_source(converted: Any) -> None:
    model = converted("gdn", "LS")
    model.config.linearize["kept"] = {"rope": False}
    assert "no rotary embedding" in str(supported(model.config))
    assert "no layer has a mixer" in str(supported(converted("gdn", "SS").config))
    assert "sliding windows" in str(supported(converted("gdn", family="mistral").config))
    gemma = str(supported(converted("gdn", family="gemma2").config))
    assert "made from llama, mistral, qwen2, qwen3, not from gemma2" in gemma


def test_layers_with_states_of_different_shapes_are_refused(converted: Any) -> None:
    model = converted("gdn", "LL")
    described = model.config.linearize
    described["mixers"].append({"type": "lightning"})
    described["layers"] = [0, 1]
    assert "states of 2 shapes" in str(supported(model.config))


# States


STATES: list[tuple[str, dict[str, Any]]] = [*((key, {}) for key in KERNEL), ("gdn", {"feature_map": "hedgehog"})]


@pytest.mark.parametrize("key, settings", STATES, ids=str)
@torch.no_grad()
def test_states_have_the_shapes_of_the_models_own_cache(converted: Any, key: str, settings: dict[str, Any]) -> None:
    model = converted(key, "LSL", settings=settings)
    shapes = states(model.config)
    assert list(shapes) == [0, 2]
    cache = cache_of(model(torch.randint(2, 97, (1, 20)), use_cache=True))
    for layer, (*conv, recurrent) in shapes.items():
        state = cache.layers[layer].state
        assert recurrent == (*state["linear"].transpose(-1, -2).shape[1:],)
        kept = [state["conv"][name][0].flatten(1) for name in "qkv" if name in state.get("conv", {})]
        assert conv == ([(*torch.cat(kept, dim=-1).shape,)] if kept else [])
    whole, half = (sum(map(math.prod, states(model.config, size)[0])) for size in (1, 2))
    assert whole == 2 * half


def test_types_of_states() -> None:
    assert state_dtypes(((3, 64), (4, 8, 8)), torch.bfloat16) == (torch.bfloat16, torch.float32)
    assert state_dtypes(((4, 8, 8),), torch.bfloat16) == (torch.float32,)


def test_heads_that_cannot_be_dealt_out(converted: Any) -> None:
    with pytest.raises(UserError, match="tensor_parallel_size 4 does not divide 4 query and 2 key heads"):
        states(converted("gdn").config, 4)


# Names


@pytest.mark.parametrize("family", FAMILIES)
@every_mixer
def test_every_tensor_of_a_checkpoint_has_one_place(converted: Any, tmp_path: Any, family: str, key: str) -> None:
    model = converted(key, "LS", family=family, **NO_WINDOW.get(family, {}))
    assert supported(model.config) is None
    tensors = load_file(export(model, None, tmp_path / "student") / "model.safetensors")
    places = {name: place(name) for name in tensors}
    assert len(set(places.values())) == len(places)
    parts: dict[str, set[Any]] = {}
    for there, part in places.values():
        parts.setdefault(there, set()).add(part)
    modules = ["input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj"]
    modules += ["self_attn.q_norm", "self_attn.k_norm"] * (family == "qwen3")
    one = [f"{module}.weight" for module in modules]
    bias = ["self_attn.qkv_proj.bias"] * (family == "qwen2")
    wanted = {name: {None} for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    for layer in range(2):
        own = [f"self_attn.mixer.{name}" for name, _ in mixer_of(model).named_parameters()] if layer == 0 else []
        held = {name: {None} for name in one + own}
        held |= {name: {"q", "k", "v"} for name in ["self_attn.qkv_proj.weight", *bias]}
        held["mlp.gate_up_proj.weight"] = {0, 1}
        wanted |= {f"model.layers.{layer}.{name}": what for name, what in held.items()}
    if model.config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    assert parts == wanted


def mixer_of(model: Any) -> Any:
    return model.model.layers[0].self_attn.mixer


@every_mixer
def test_shards_put_together_are_the_whole(converted: Any, key: str) -> None:
    model = converted(key)
    mixer, shape = mixer_of(model), family_of(model.config).shape(model.config, 0)
    local = full_mixer(conversion(model.config).layers[0], local_shape(shape, 2))  # type: ignore[arg-type]
    for name, whole in mixer.named_parameters():
        small = local.get_parameter(name).shape
        both = [shard(whole, small, rank) for rank in range(2)]
        assert all(part.shape == small for part in both)
        split = [dim for dim in range(whole.dim()) if whole.shape[dim] != small[dim]]
        assert torch.equal(torch.cat(both, dim=split[0]) if split else both[0], whole), name
    with pytest.raises(UserError, match=r"shape \[5, 3\] .* shape \[2, 3\]"):
        shard(torch.zeros(5, 3), (2, 3), 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_says_which_layers_have_states(converted: Any, family: str) -> None:
    config = converted("gdn", "LSL", family=family, **NO_WINDOW.get(family, {})).config
    for _ in range(2):
        adapt(config)
        assert config.layer_types == ["linear_attention", "full_attention", "linear_attention"]
        assert getattr(config, "max_window_layers", 3) == 3
