"""Qwen3-Next made of converted Qwen3 and Qwen3-MoE: the same logits, in every way of running it, from every tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixers.mixer_cases import NATIVE

from linearize.arguments import cache_of, continued
from linearize.errors import UserError
from linearize.hf.native import native_model, native_of
from linearize.natives.qwen3_next import Qwen3Next

YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "yarn": ("qwen3", {"rope_parameters": YARN}),
    "ungrouped": ("qwen3", {"num_key_value_heads": 4}),
    "wide heads": ("qwen3", {"head_dim": 12}),
    "qwen3_moe": ("qwen3_moe", {}),
    "experts summing to one": ("qwen3_moe", {"norm_topk_prob": True}),
    "dense layers among experts": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "experts in every other layer": ("qwen3_moe", {"decoder_sparse_step": 2}),
}
every_source = pytest.mark.parametrize("source", SOURCES)


def tokens(batch: int, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 97, (batch, count), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def made(converted: Any) -> Any:
    """Factory (source, layers, seed, settings) -> a converted model with random mixers."""

    def make(source: str = "qwen3", layers: str = "LLLS", seed: int = 0, **settings: Any) -> Any:
        family, overrides = SOURCES[source]
        return converted("gdn", layers, seed=seed, settings={**NATIVE, **settings}, family=family, **overrides)

    return make


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 2e-5 of the largest logit: what float32 leaves after four layers, in which transformers' own recurrence
    computes whatever the type of the weights.
    """
    assert found.shape == expected.shape and found.dtype == expected.dtype == torch.float32
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@every_source
@pytest.mark.parametrize("layers", ["LLLS", "LSLS", "SLSS"])
@torch.no_grad()
def test_the_logits_are_the_converted_models(made: Any, source: str, layers: str) -> None:
    ours, ids = made(source, layers), tokens(3, 100)
    native = native_model(ours)
    assert type(native).__name__ == "Qwen3NextForCausalLM" and type(native) is Qwen3Next.model_class
    assert "linear" in native.config.layer_types[layers.index("L")]
    assert native.config.attention_bias and native.config.qkv_bias  # vLLM's name of it
    mask = torch.ones_like(ids)
    mask[1, :17], mask[2, 90:] = 0, 0
    for options in ({}, {"attention_mask": mask}):
        found, expected = (model(ids, **options).logits for model in (native, ours))
        real = mask.bool() if options else torch.ones_like(mask, dtype=torch.bool)
        assert_same(found[real], expected[real])


@pytest.mark.parametrize(
    "settings",
    [
        {"output": {**NATIVE["output"], "scale": False}},
        {"conv": {**NATIVE["conv"], "size": 2}},
        {"conv": {**NATIVE["conv"], "size": 7}},
        {"decay": {"half_life": [2.0, 9.0]}},
    ],
    ids=str,
)
@torch.no_grad()
def test_settings_that_it_leaves_free(made: Any, settings: dict[str, Any]) -> None:
    ours, ids = made(**settings), tokens(2, 40)
    assert_same(native_model(ours)(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("source", ["qwen3", "qwen3_moe"])
@torch.no_grad()
def test_every_tensor_of_the_converted_model_counts(made: Any, source: str) -> None:
    """A change of any of them changes both models alike; of the norms that swapped layers leave out, neither.

    The median over tokens, because a change may bring some router within rounding of another choice.
    """
    ours, ids = made(source), tokens(4, 12)
    before, state = ours(ids).logits, {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    noise = torch.Generator().manual_seed(5)
    for name, tensor in state.items():
        ours.load_state_dict({**state, name: tensor + 0.5 * torch.randn(tensor.shape, generator=noise)})
        found, expected = native_model(ours)(ids).logits, ours(ids).logits
        unread = "self_attn.mixer" not in name and "_norm" in name and ".layers.3." not in name and "self_attn" in name
        assert torch.equal(expected, before) == unread, name
        apart = (found - expected).abs().amax(-1).median()
        assert apart <= 1e-5 * expected.abs().max(), name


@every_source
def test_every_tensor_of_the_native_model_is_given_and_none_is_left(made: Any, source: str) -> None:
    ours = made(source)
    tensors, config = dict(ours.state_dict()), ours.config
    given = Qwen3Next.weights(tensors, config)
    assert not tensors
    expected = Qwen3Next.model_class(Qwen3Next.config(config)).state_dict()
    assert {name: t.shape for name, t in given.items()} == {name: t.shape for name, t in expected.items()}


def test_tensors_without_a_place_are_refused(made: Any) -> None:
    for name in ("model.layers.1.self_attn.mixer.more", "model.layers.3.more", "model.more"):
        ours = made()
        parent, _, last = name.rpartition(".")
        ours.get_submodule(parent).register_buffer(last, torch.zeros(3))
        with pytest.raises(UserError, match=f"Qwen3NextForCausalLM has no place for 1 tensors, such as {name}"):
            native_model(ours)


def test_tensors_that_are_not_given_are_refused(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, name = Qwen3Next.weights, "model.layers.3.self_attn.q_norm.weight"

    def fewer(tensors: Any, config: Any) -> Any:
        return {key: tensor for key, tensor in weights(tensors, config).items() if key != name}

    monkeypatch.setattr(Qwen3Next, "weights", fewer)
    with pytest.raises(UserError, match=f"Qwen3NextForCausalLM is not given 1 tensors, such as {name}"):
        native_model(made())


@pytest.mark.parametrize("source", ["qwen3", "qwen3_moe"])
@torch.no_grad()
def test_pieces_and_steps_equal_one_call(made: Any, source: str) -> None:
    ours, ids = made(source), tokens(2, 140)
    native, expected = native_model(ours), ours(ids).logits
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    padded = ours(ids, attention_mask=mask).logits
    for lengths in ([140], [100, *[1] * 40], [12, 70, 3, 55]):  # transformers reads padding in the first piece alone
        for given, truth in ((None, expected), (mask, padded)):
            cache, found, start = None, [], 0
            for length in lengths:
                end = start + length
                options = {} if given is None else {"attention_mask": given[:, :end]}
                result = continued(native, cache, input_ids=ids[:, start:end], **options)
                cache, start = cache_of(result), end
                found.append(result.logits)
            together = torch.cat(found, dim=1)
            assert_same(together[:, 11:], truth[:, 11:])


@pytest.mark.parametrize("source", ["qwen3", "tied", "qwen3_moe"])
@pytest.mark.parametrize("layers", ["LLLS", "LSLS"])
@torch.no_grad()
def test_it_generates_what_the_converted_model_does(made: Any, source: str, layers: str) -> None:
    ours, ids = made(source, layers), tokens(3, 30)
    native, mask = native_model(ours), torch.ones_like(ids)
    mask[1, :12] = 0
    ids[1, :12] = 1
    options = {"attention_mask": mask, "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    expected = ours.generate(ids, **options)
    assert expected.shape == (3, 50) and len(set(expected[:, 30:].flatten().tolist())) > 3
    for cached in (True, False):
        assert torch.equal(native.generate(ids, use_cache=cached, **options), expected)


def test_its_state_is_as_large_as_ours(made: Any) -> None:
    ours, ids = made(), tokens(1, 40)
    native = native_model(ours)
    with torch.no_grad():
        theirs, own = (cache_of(model(ids, use_cache=True)) for model in (native, ours))
    heads, size = 4, 8
    recurrent = theirs.layers[0].recurrent_states
    recurrent = recurrent[0] if isinstance(recurrent, dict | list | tuple) else recurrent
    assert recurrent.shape == own.layers[0].state["linear"].shape == (1, heads, size, size)


def test_the_gates_of_softmax_layers_are_open_to_the_last_digit() -> None:
    from linearize.natives.qwen3_next import OPEN

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        gate = torch.tensor(OPEN, dtype=dtype)
        assert torch.sigmoid(gate) == 1 and gate == OPEN


def test_it_is_found_from_the_configuration_alone(made: Any) -> None:
    assert native_of(made().config) is Qwen3Next
