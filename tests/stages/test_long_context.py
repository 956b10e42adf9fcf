"""Training at a longer length: the configuration, the rotary embedding and a reloaded checkpoint agree."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from pydantic import ValidationError
from trainable import dataset, find_llama, make_recipe, make_stage, metrics, snapshot, write_source
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import linearize
from linearize.errors import UserError
from linearize.families.base import Family
from linearize.hf.export import export
from linearize.pipeline import convert
from linearize.positions import extend, extended
from linearize.preflight import plan_of
from linearize.registry import find, keys
from linearize.swap import teacher_path

LAYERS = "LSL"
IDS = torch.randint(2, 97, (1, 90), generator=torch.Generator().manual_seed(0))
SHORT = {"max_position_embeddings": 40}
POLICIES: dict[str, dict[str, Any]] = {
    "keep": {},
    "yarn": {"positions": "yarn"},
    "linear": {"positions": "linear"},
    "theta": {"positions": "theta", "theta": 5e5},
}


def long_context(steps: int = 1, **settings: Any) -> Any:
    return make_stage("long_context", **{"seq_len": 80, "tokens": steps * 4 * 80, "train": ["*"], **settings})


def frequencies(policy: str) -> torch.Tensor:
    """Of a head of 8 with base 10,000, from 40 to 80 tokens; yarn's by its equations 17 to 23."""
    base = 5e5 if policy == "theta" else 1e4
    plain = torch.tensor([base ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    if policy == "linear":
        return plain / 2
    if policy != "yarn":
        return plain

    def dimension(turns: float) -> float:
        return 8 * math.log(40 / (turns * 2 * math.pi)) / (2 * math.log(1e4))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), 7)
    ramp = ((torch.arange(4).double() - low) / (high - low)).clamp(0, 1)
    return plain * (1 - ramp) + plain / 2 * ramp


@pytest.mark.parametrize("policy", POLICIES)
def test_config_rotary_and_reloaded_checkpoints_agree(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, policy: str
) -> None:
    model = converted("lolcats", LAYERS, **SHORT)
    before = snapshot(model)
    stage = long_context(2, lr=1e-3, **POLICIES[policy])
    stage.check(model)
    assert model.config.max_position_embeddings == 40, "a check changes nothing"
    stage.run(model, dataset(tmp_path, pico_tokenizer, seq_len=80), tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["tokens"] == 2 * 4 * 80
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    rotary = model.model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq.double(), frequencies(policy), rtol=1e-6, atol=0)
    assert rotary.attention_scaling == pytest.approx(1 + 0.1 * math.log(2) if policy == "yarn" else 1)
    assert rotary.inv_freq.dtype == torch.float32
    out = export(model, pico_tokenizer, tmp_path / "out")
    written = json.loads((out / "config.json").read_text())
    assert written["max_position_embeddings"] == 80
    rope = written["rope_parameters"]
    assert rope["rope_type"] == (policy if policy in ("yarn", "linear") else "default")
    assert rope["rope_theta"] == (5e5 if policy == "theta" else 1e4)
    assert rope.get("factor") == (2 if policy in ("yarn", "linear") else None)
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(linearize.load(out)[0](IDS).logits, expected)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(IDS).logits, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_softmax_layers_see_the_positions_of_transformers(
    converted: Callable[..., Any], pico_config: Callable[..., Any], policy: str
) -> None:
    """The source's path, on the new configuration, is the plain model of transformers with it."""
    model = converted("lolcats", LAYERS, **SHORT)
    settings = POLICIES[policy]
    extend(model, find_llama(), extended(model.config, find_llama(), 80, settings.get("positions", "keep"), 5e5))
    values = {k: v for k, v in model.config.to_dict().items() if k in LlamaConfig().to_dict() and k != "model_type"}
    plain = LlamaForCausalLM(LlamaConfig(**values)).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".mixer." not in k})
    old = LlamaForCausalLM(pico_config(**SHORT)).eval()
    old.load_state_dict(plain.state_dict())
    with torch.no_grad(), teacher_path(model):
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        assert torch.equal(model(IDS).logits, old(IDS).logits) == (policy == "keep")


@pytest.mark.parametrize("policy", ["keep", "yarn"])
def test_a_finished_and_a_killed_run_restore_the_configuration_too(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    data = dataset(tmp_path, pico_tokenizer, seq_len=80)
    settings = {"lr": 1e-3, "checkpoint_every": 1, **POLICIES[policy]}
    whole, restored, resumed = (converted("lolcats", LAYERS, **SHORT) for _ in range(3))
    long_context(3, **settings).run(whole, data, tmp_path / "run")
    long_context(3, **settings).run(restored, data, tmp_path / "run", resume=True)
    stage, steps = long_context(3, **settings), []
    original = type(stage).backward

    def dying(self: Any, *args: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(stage), "backward", dying)
        stage.run(converted("lolcats", LAYERS, **SHORT), data, tmp_path / "killed")
    long_context(3, **settings).run(resumed, data, tmp_path / "killed", resume=True)
    with torch.no_grad():
        for again in (restored, resumed):
            assert again.config.to_dict() == whole.config.to_dict()
            assert again.config.max_position_embeddings == 80
            assert torch.equal(again(IDS).logits, whole(IDS).logits)


def test_an_adapter_that_is_not_merged_is_restored(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path
) -> None:
    data, lora = dataset(tmp_path, pico_tokenizer, seq_len=80), {"r": 2, "merge": False}
    models = [converted("lolcats", LAYERS, **SHORT) for _ in range(2)]
    for model, resume in zip(models, (False, True), strict=True):
        stage = long_context(2, lr=1e-2, train=[], lora=lora, positions="yarn")
        stage.run(model, data, tmp_path / "run", resume=resume)
    with torch.no_grad():
        assert models[1].config.rope_parameters["factor"] == 2
        assert torch.equal(models[0](IDS).logits, models[1](IDS).logits)


def test_with_kept_positions_the_teacher_stays_the_source(
    converted: Callable[..., Any], pico_model: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path
) -> None:
    model = converted("gdn", LAYERS, **SHORT)
    data = dataset(tmp_path, pico_tokenizer, seq_len=80)
    long_context(2, lr=1e-2).run(model, data, tmp_path / "run", keep_source=True)
    with torch.no_grad(), teacher_path(model):
        assert torch.equal(model(IDS).logits, pico_model(**SHORT)(IDS).logits)
    fresh = converted("gdn", LAYERS, **SHORT)
    with pytest.raises(UserError, match="positions: yarn changes what the source model .* computes"):
        long_context(positions="yarn").run(fresh, data, tmp_path / "other", keep_source=True)
    assert fresh.config.max_position_embeddings == 40


@pytest.mark.parametrize("policy", ["keep", "linear"])
def test_a_second_stage_goes_on_from_the_first(converted: Callable[..., Any], policy: str) -> None:
    model, family = converted("gdn", LAYERS, **SHORT), find_llama()
    for length in (60, 80):
        extend(model, family, extended(model.config, family, length, policy))  # type: ignore[arg-type]
    torch.testing.assert_close(model.model.rotary_emb.inv_freq.double(), frequencies(policy), rtol=1e-6, atol=0)
    yarn = converted("gdn", LAYERS, **SHORT)
    for length in (60, 80):
        extend(yarn, family, extended(yarn.config, family, length, "yarn"))
    torch.testing.assert_close(yarn.model.rotary_emb.inv_freq.double(), frequencies("yarn"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("key", keys("families"))
@pytest.mark.parametrize("policy", ["keep", "yarn"])
def test_every_family_is_extended_as_its_written_configuration_says_or_refused(key: str, policy: Any) -> None:
    model = pico.pico_model(key)
    if getattr(model.config, "head_dim", 0) is None:  # of gpt_neox, which has no such entry but in pico models
        del model.config.head_dim
    family = find("families", key, Family).of(model.config, lambda package, name: find(package, name, Family))
    try:
        changes = extended(model.config, family, 1024, policy)
        extend(model, family, changes)
    except UserError as error:
        assert "learned positions" in str(error) if key in ("gpt2", "bert") else (key, policy) == ("phi3", "yarn"), (
            error
        )
        return
    read = type(model.config).from_dict(copy.deepcopy(model.config.to_dict()))
    other = type(model)(read).eval()
    other.load_state_dict(model.state_dict())
    text = read.get_text_config()
    assert text.max_position_embeddings == 1024
    buffers = dict(model.named_buffers())
    for name, buffer in other.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    nested = text.rope_parameters.get("full_attention", text.rope_parameters)
    assert nested["rope_type"] == ("yarn" if policy == "yarn" else "default")


def test_positions_that_do_not_fit_are_refused(pico_config: Callable[..., Any]) -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"original_max_position_embeddings": 64, "rope_theta": 5e5}
    config = pico_config(rope_parameters=llama3)
    with pytest.raises(UserError, match="yarn cannot be put on .* rope_type llama3; use keep or theta"):
        extended(config, find_llama(), 1024, "yarn")
    assert extended(config, find_llama(), 1024, "theta", 1e6)["rope_parameters"] == {**llama3, "rope_theta": 1e6}
    assert extended(config, find_llama(), 512, "keep") == {}
    with pytest.raises(UserError, match="more tokens than the 512 .* seq_len is 400; use positions: keep"):
        extended(pico_config(), find_llama(), 400, "linear")
    dynamic = pico_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UserError, match="grow with the length by themselves .*seq_len up to 512"):
        extended(dynamic, find_llama(), 1024, "keep")
    with pytest.raises(ValidationError, match="positions: theta needs theta"):
        long_context(positions="theta")
    with pytest.raises(ValidationError, match="no other policy reads it"):
        long_context(theta=1e6)
    with pytest.raises(ValidationError, match="seq_len"):
        make_stage("long_context", train=["*"])


@pytest.fixture
def source(pico_model: Any, pico_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("linearize.data.dataset.HF_HOME", str(tmp_path / "hf"))
    write_source(tmp_path, pico_model(**SHORT), pico_tokenizer)
    return tmp_path


LONG = {"type": "long_context", "tokens": 640, "batch_size": 4, "seq_len": 80, "train": ["*"], "positions": "yarn"}
KL = {"type": "logit_kl", "tokens": 128, "batch_size": 4, "train": ["*.mixer.*"]}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"stages": [LONG, KL]}, "positions: yarn changes what the source model"),
        ({"stages": [LONG], "evaluation": {"windows": 1}}, "set evaluation.divergence: false"),
        ({"stages": [{**LONG, "seq_len": 32}]}, "seq_len 32 is not longer than data.seq_len 32; raise it"),
        ({"stages": [{**LONG, "train": []}]}, "stage long_context trains nothing"),
    ],
)
def test_mistakes_are_refused_by_the_plan(source: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(make_recipe(source, **sections))


def test_a_conversion_that_ends_with_it(source: Path) -> None:
    evaluation = {"windows": 1, "recall": False, "branches": False, "divergence": False, "split": "train"}
    recipe = make_recipe(source, stages=[KL, LONG], evaluation=evaluation)
    out = convert(recipe, source / "out", say=lambda text: None)
    config = json.loads((out / "config.json").read_text())
    assert config["max_position_embeddings"] == 80 and config["rope_parameters"]["rope_type"] == "yarn"
    first = linearize.load(out)[0]
    (out / "config.json").unlink()
    convert(recipe, out, resume=True, say=lambda text: None)
    with torch.no_grad():
        assert torch.equal(linearize.load(out)[0](IDS).logits, first(IDS).logits)
