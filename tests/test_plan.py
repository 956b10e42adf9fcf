"""The plan: which layers, how many parameters and bytes (against arithmetic by hand), and what it prints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pico
import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from linearize.arguments import cache_of
from linearize.errors import UserError
from linearize.plan import Plan, choose_layers, make_plan
from linearize.recipe import Recipe
from linearize.recipe_files import available
from linearize.swap import swapped


def llama_3_8b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def plan_8b(*overrides: str, recipe: str = "lolcats") -> Plan:
    return make_plan(Recipe.load(recipe, "llama-3-8b", overrides), llama_3_8b())


@pytest.mark.parametrize(
    ("layers", "depth", "chosen"),
    [
        ("all", 3, {0, 1, 2}),
        ("L", 3, {0, 1, 2}),
        ("LLLS", 8, {0, 1, 2, 4, 5, 6}),
        ("SL", 4, {1, 3}),
        ("LSS", 3, {0}),
        ([2, 0], 3, {0, 2}),
    ],
)
def test_layers_are_chosen_by_pattern_and_number(layers: Any, depth: int, chosen: set[int]) -> None:
    assert choose_layers(layers, depth) == chosen


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            "LLS",
            "'LLS' has 3 letters and does not repeat evenly over 8 layers; lengths that fit: 1, 2, 4, 8; or let a "
            "selector find the layers: layers={type: window_ablation, keep: 0.25}",
        ),
        ("LLLLLLLLL", "has 9 letters"),
        ("SS", "layers: 'SS' swaps no layer; put an L in the pattern"),
        ([], r"layers: \[\] swaps no layer"),
        ([0, 8, -1], r"layers: \[8, -1\] not in this model; it has layers 0 to 7"),
        ([3, 0, 3], r"layers: \[3\] more than once in \[3, 0, 3\]; name each layer to swap once"),
        ("LX", "layers: 'LX' is neither 'all' nor a pattern of L"),
        ("", "layers: '' is neither"),
    ],
)
def test_layers_that_do_not_fit(layers: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_layers(layers, 8)


def test_parameters_of_llama_3_8b_by_hand() -> None:
    plan = plan_8b()
    embedding = 128256 * 4096
    attention = 4096 * (32 * 128) + 2 * 4096 * (8 * 128) + (32 * 128) * 4096  # q, k and v, o
    mlp, norms = 3 * 4096 * 14336, 2 * 4096
    assert plan.source_parameters == 2 * embedding + 32 * (attention + mlp + norms) + 4096 == 8_030_261_248
    feature_map, window_factor = 32 * 128 * 64, 32  # one [128, 64] matrix and one scalar per query head
    assert plan.new_parameters == 32 * (2 * feature_map + window_factor) == 16_778_240
    assert plan_8b(recipe="liger").new_parameters == 0


def test_cache_of_llama_3_8b_by_hand() -> None:
    bfloat16, float32 = 2, 4
    kv = 8 * (128 + 128) * bfloat16
    ring = 64 * kv + 64 + 8  # keys and values of the window, which of them exist, and a count of tokens
    linear = 32 * 128 * 128 * float32 + 32 * 128 * float32  # S [heads, features, V] and z [heads, features]
    plan = plan_8b()
    assert {layer.kv_bytes_per_token for layer in plan.layers} == {kv}
    assert {layer.state_bytes for layer in plan.layers} == {ring + linear}
    assert plan.cache_bytes(100) == plan.cache_bytes(100_000) == 32 * (ring + linear)
    hybrid = plan_8b("layers=LLLS")
    assert hybrid.cache_bytes(1000) == 24 * (ring + linear) + 8 * kv * 1000


def test_the_plan_does_not_depend_on_the_backend_of_this_machine() -> None:
    assert plan_8b("mixer.backend=fla").cache_bytes(1) == plan_8b().cache_bytes(1)


def test_the_plan_is_what_the_swap_does(converted: Any, pico_config: Any) -> None:
    changes = ["layers=LSL", "mixer.window=8", "mixer.rope=both", "mixer.feature_map.dim=null", "model.dtype=float32"]
    plan = make_plan(Recipe.load("lolcats", "demo", changes), pico_config())
    model = converted("lolcats", "LSL")
    real = dict(model.named_parameters())
    planned = {f"{x.module}.{t.name}": t.shape for x in plan.layers for t in x.new}
    assert planned == {name: tuple(p.shape) for name, p in real.items() if ".mixer." in name}
    assert plan.source_parameters + plan.new_parameters == sum(p.numel() for p in model.parameters())
    assert [x.module for x in plan.layers if x.mixer] == list(swapped(model))
    with torch.no_grad():
        cache = cache_of(model(torch.arange(2, 42)[None], use_cache=True))
    assert plan.layers[0].state_bytes == cache.layers[0].nbytes()
    assert plan.description()["layers"] == [0, None, 0]
    assert plan.description()["mixers"][0]["window"] == 8


def test_planning_allocates_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, register = [], torch.nn.Module.register_parameter

    def watch(self: Any, name: str, parameter: Any) -> None:
        if parameter is not None and parameter.device.type != "meta":
            sizes.append(parameter.numel())
        register(self, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", watch)
    plan_8b()
    assert sum(sizes) < 8_030_261_248 / 100


def test_what_the_plan_prints() -> None:
    lines = str(plan_8b("layers=LLLS")).splitlines()
    text = "\n".join(lines)
    assert lines[0].startswith("source      meta-llama/Meta-Llama-3-8B (llama, 8,030.3M parameters, bfloat16)")
    assert lines[1].startswith("mixer       lolcats(feature_map=hedgehog(dim=64), update=additive, window=64")
    assert lines[2] == "layers      24 of 32 swapped: " + "LLLS" * 8
    assert "new         12.584M parameters" in text
    assert "model.layers.0.self_attn.mixer.map_q.weight [32, 128, 64], identity per head" in text
    assert "2,048 tokens: 256.0 MiB -> " in text and "weights 14.98 GiB" in text


def test_a_layer_that_sees_a_window_caches_no_more() -> None:
    config = pico.pico_config("gemma2")  # layers 0 and 2 see 12 tokens
    plan = make_plan(Recipe.load("lolcats", "demo", ["layers=LSS"]), config)
    kv, state = plan.layers[1].kv_bytes_per_token, plan.layers[0].state_bytes
    assert plan.cache_bytes(5) == state + 2 * 5 * kv and plan.cache_bytes(1000) == state + (1000 + 12) * kv
    assert f"2,048 tokens: {(2048 + 24) * kv / 2**20:,.1f} MiB ->" in str(plan)


def test_an_encoder_has_no_cache() -> None:
    assert "cache  " not in str(make_plan(Recipe.load("hedgehog_encoder", "demo"), pico.pico_config("bert")))


def test_an_unsupported_family_is_named() -> None:
    with pytest.raises(UserError, match="unknown family 'lama'; did you mean 'llama'"):
        make_plan(Recipe.load("lolcats", "demo"), SimpleNamespace(model_type="lama", num_hidden_layers=2))


def test_only_the_last_stage_keeps_its_adapter() -> None:
    with pytest.raises(UserError, match="only the last stage can leave its adapter unmerged"):
        plan_8b("stages.0={type: finetune, tokens: 1, lora: {merge: false}}")


def test_an_unknown_feature_map_is_named() -> None:
    with pytest.raises(UserError, match="unknown feature map 'hedgehg'; did you mean 'hedgehog'"):
        plan_8b("mixer.feature_map.type=hedgehg")


def by_hand(hidden: int, heads: int, kv_heads: int, size: int, bias: int = 0, norms: int = 0) -> int:
    """Parameters of one layer's attention: q, k and v, o, biases on q, k, v, and norms of queries and keys."""
    return hidden * heads * size * 2 + 2 * hidden * kv_heads * size + bias + norms


REAL: dict[str, tuple[dict[str, Any], int, int, tuple[int, int, int]]] = {
    # alias: (configuration, parameters by hand, layers, (query heads, key heads, head size))
    "qwen3-8b": (
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        },
        2 * 151936 * 4096 + 36 * (by_hand(4096, 32, 8, 128, norms=2 * 128) + 3 * 4096 * 12288 + 2 * 4096) + 4096,
        36,
        (32, 8, 128),
    ),
    "mistral-7b": (
        {
            "model_type": "mistral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        },
        2 * 32000 * 4096 + 32 * (by_hand(4096, 32, 8, 128) + 3 * 4096 * 14336 + 2 * 4096) + 4096,
        32,
        (32, 8, 128),
    ),
    "gemma-2-9b": (
        {
            "model_type": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "dtype": "float32",
        },
        256000 * 3584 + 42 * (by_hand(3584, 16, 8, 256) + 3 * 3584 * 14336 + 4 * 3584) + 3584,  # tied embeddings
        42,
        (16, 8, 256),
    ),
    "pythia-1b": (
        {
            "model_type": "gpt_neox",
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
            "max_position_embeddings": 2048,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "dtype": "float16",
        },
        2 * 50304 * 2048  # below: q, k, v and o with biases, two layers of the MLP with biases, two norms with biases
        + 16 * (by_hand(2048, 8, 8, 256, bias=4 * 2048) + 2 * 2048 * 8192 + 8192 + 2048 + 4 * 2048)
        + 2 * 2048,
        16,
        (8, 8, 256),
    ),
}


@pytest.mark.parametrize("alias", REAL)
def test_plans_of_real_models_by_hand(alias: str) -> None:
    settings, parameters, depth, (heads, kv_heads, size) = REAL[alias]
    config = AutoConfig.for_model(**settings)
    plan = make_plan(Recipe.load("lolcats", alias), config)
    dtype = {"bfloat16": 2, "float16": 2, "float32": 4}[settings["dtype"]]
    assert plan.source_parameters == parameters
    assert plan.new_parameters == depth * (2 * heads * size * size + heads)  # two maps, one factor a head
    kv = kv_heads * 2 * size * dtype
    assert {layer.kv_bytes_per_token for layer in plan.layers} == {kv} and len(plan.layers) == depth
    linear = heads * 2 * size * (size + 1) * 4  # S [heads, features, V] and z [heads, features], float32
    assert {layer.state_bytes for layer in plan.layers} == {64 * kv + 64 + 8 + linear}
    liger = make_plan(Recipe.load("liger", alias), config)
    assert liger.new_parameters == 0
    assert {layer.state_bytes for layer in liger.layers} == {64 * kv + 64 + 8 + heads * size * size * 4}


@pytest.mark.parametrize(
    ("alias", "notes"),
    [
        ("qwen3-8b", []),
        ("mistral-7b", ["layers 0-31 attended to the last 4,096 tokens alone; a mixer there sees all before"]),
        (
            "gemma-2-9b",
            [
                "layers 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40 attended to the "
                "last 4,096 tokens alone; a mixer there sees all before",
                "logits are capped at 50 in softmax windows; the linear branch has no logits to cap",
            ],
        ),
        ("pythia-1b", []),
    ],
)
def test_plans_say_what_mixers_do_not_honour(alias: str, notes: list[str]) -> None:
    plan = make_plan(Recipe.load("lolcats", alias), AutoConfig.for_model(**REAL[alias][0]))
    assert list(plan.concerns) == notes and all(note in str(plan) for note in notes)


def test_plans_say_which_training_rows_are_beyond_the_positions_of_the_source() -> None:
    def told(*overrides: str) -> list[str]:
        plan = make_plan(Recipe.load("auto_linear", "llama-3-8b", overrides), tiny)
        return [note for note in plan.concerns if "training rows" in note]

    tiny = LlamaConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, max_position_embeddings=256)
    (note,) = told()
    assert note.startswith("training rows of 512, 2,048 tokens are longer than the 256 positions")
    assert told("stages.0.seq_len=256")[0].startswith("training rows of 2,048 tokens")
    assert told("stages.*.seq_len=256") == []
    longer = "stages.1={type: long_context, tokens: 1k, seq_len: 1024, train: [all]}"
    assert told("data.seq_len=256", "stages.0.seq_len=256", longer) == []


@pytest.mark.parametrize("alias", ["gemma-2-9b", "pythia-1b"])
@pytest.mark.parametrize(
    "method", sorted(name.partition("/")[2] for name in available() if name.startswith("default/"))
)
def test_every_default_recipe_plans_every_real_model(alias: str, method: str) -> None:
    recipe = Recipe.load(method, alias)
    if recipe.export.native:  # of what such a model can be made of, with this shape
        alias = "qwen3-8b"
    pattern = ["layers=[1]"] if recipe.layers == "all" else []
    config = AutoConfig.for_model(**{**REAL[alias][0], "num_hidden_layers": 4})
    plan = make_plan(Recipe.load(method, alias, pattern), config)
    if isinstance(recipe.layers, dict):
        expected = 4 - round(recipe.layers["keep"] * 4)
    else:
        expected = 1 if pattern else len(choose_layers(recipe.layers, 4))
    assert sum(layer.mixer is not None for layer in plan.layers) == expected
