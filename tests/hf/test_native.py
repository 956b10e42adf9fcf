"""Native exports: what stands in the way is said by the plan, what is written loads without any code, and nothing that
differs is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from hf.test_export import in_clean_process, logits, weights
from mixers.mixer_cases import NATIVE
from trainable import make_recipe, write_source
from transformers import AutoConfig, AutoModelForCausalLM

import linearize
from linearize.cli.main import main
from linearize.errors import UserError
from linearize.hf import native as hf_native
from linearize.hf.export import export
from linearize.hf.native import check, native_model
from linearize.pipeline import convert
from linearize.plan import Plan, make_plan
from linearize.preflight import plan_of
from linearize.recipe import Recipe
from linearize.registry import keys

SWAPPED = {"num_hidden_layers": 4}


@pytest.fixture
def student(converted: Any) -> Any:
    """Factory (layers, family, config overrides) -> a converted model that is a Qwen3-Next."""

    def make(layers: str = "LLLS", family: str = "qwen3", **overrides: Any) -> Any:
        return converted("gdn", layers, settings=NATIVE, family=family, **overrides)

    return make


def plan(*overrides: str, family: str = "qwen3", recipe: str = "qwen3_next", **config: Any) -> Plan:
    return make_plan(Recipe.load(recipe, "owner/name", overrides), pico.pico_config(family, **{**SWAPPED, **config}))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_the_recipe_plans_a_native_export_and_says_so(family: str) -> None:
    planned = plan(family=family)
    assert planned.native == "qwen3_next"
    assert "\nexport      as qwen3_next of transformers; loads without trust_remote_code\n" in f"{planned}\n"
    other = plan("export.native=false", family=family)
    assert other.native is None and "trust_remote_code" not in str(other)


OBSTACLES: list[tuple[str, list[str], dict[str, Any], str]] = [
    ("layers", ["layers=all"], {}, "layers keeps no softmax layer: .*; keep some, as in LLLS"),
    ("kept", ["kept.rope=false"], {}, "kept changes its softmax layers .no rotary embedding.; leave kept out"),
    ("kept scale", ["kept.log_scale=64"], {}, "kept changes its softmax layers"),
    ("mixer", ["mixer=lolcats"], {}, "mixer.feature_map is hedgehog: .*; set it to identity"),
    ("own mixer", ["mixer={type: still}"], {}, "mixer Still is not made of parts; take gdn with the settings of"),
    ("decay", ["mixer.decay=fixed"], {}, "mixer.decay is fixed: .*; set it to scalar"),
    ("write", ["mixer.decay.write=true"], {}, "mixer.decay.write is true: .*; set it to false"),
    ("update", ["mixer.update={type: additive}"], {}, "mixer.update is additive: .*; set it to delta"),
    ("negative", ["mixer.update={negative: true, beta: 1.0}"], {}, "mixer.update.negative is true"),
    ("beta bias", ["mixer.update.bias=true"], {}, "mixer.update.bias is true: .* no bias; set it to false"),
    ("scale", ["mixer.scale=none"], {}, "mixer.scale is none: .*; set it to sqrt"),
    ("window", ["mixer.window=8"], {}, "mixer.window is 8: .*; set it to 0"),
    ("rope", ["mixer.rope=recurrent"], {}, "mixer.rope is recurrent: .*; set it to none"),
    ("no conv", ["mixer.conv.size=0"], {}, "mixer.conv.size is 0: .* at least 2 tokens; set it to 4"),
    ("short conv", ["mixer.conv.size=1"], {}, "mixer.conv.size is 1"),
    ("inputs", ["mixer.conv.inputs=qk"], {}, "mixer.conv.inputs is qk: .*; set it to qkv"),
    ("activation", ["mixer.conv.activation=none"], {}, "mixer.conv.activation is none: .*; set it to silu"),
    ("qk_norm", ["mixer.qk_norm=l2"], {}, "mixer.qk_norm is l2: .*; set it to none"),
    ("source_norm", ["mixer.source_norm=true"], {}, "mixer.source_norm is true: .*; set it to false"),
    ("kv_heads", ["mixer.kv_heads=cloned"], {}, "mixer.kv_heads is cloned: .*; set it to shared"),
    ("norm", ["mixer.output.norm=group"], {}, "mixer.output.norm is group: .*; set it to rms"),
    ("gate", ["mixer.output.gate=sigmoid"], {}, "mixer.output.gate is sigmoid: .*; set it to silu"),
    ("gate_rank", ["mixer.output.gate_rank=4"], {}, "mixer.output.gate_rank is 4: .*; set it to null"),
    ("gate_bias", ["mixer.output.gate_bias=true"], {}, "mixer.output.gate_bias is true: .*; set it to false"),
    ("skip", ["mixer.skip=true"], {}, "mixer.skip is true: .*; set it to false"),
    ("eps", ["mixer.output.eps=1e-5"], {}, "mixer.output.eps is 1e-05: its norms share one eps; set it to 1e-06"),
    ("model eps", [], {"rms_norm_eps": 1e-4}, "mixer.output.eps is 1e-06: .*; set it to 0.0001"),
    ("activation of the model", [], {"hidden_act": "gelu"}, "hidden_act of the source is gelu"),
    (
        "biases",
        [],
        {"attention_bias": True},
        "the source's q, k, v and o projections have biases .attention_bias., its linear layers none",
    ),
    (
        "windows",
        [],
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
        "layers 3 keep a sliding window, which it does not have; swap them with layers",
    ),
    (
        "default gdn",
        ["mixer={type: gdn}", "layers=LLLS"],
        {},
        "mixer.conv.activation is none(.|\n)*mixer.source_norm is true",
    ),
]


@pytest.mark.parametrize(("overrides", "config", "message"), [o[1:] for o in OBSTACLES], ids=[o[0] for o in OBSTACLES])
def test_every_obstacle_is_named_by_the_plan(overrides: list[str], config: dict[str, Any], message: str) -> None:
    with pytest.raises(
        UserError, match=f"this model is no architecture that transformers has(.|\n)*qwen3_next: {message}"
    ):
        plan(*overrides, **config)
    assert plan(*overrides, "export.native=false", **config).native is None


def test_a_denominator_is_an_obstacle() -> None:
    """No delta rule has one, so it comes with others."""
    with pytest.raises(UserError, match=r"mixer.normalize is true: its read-out has no denominator; set it to false"):
        plan("mixer={type: hedgehog}")


def test_windows_of_swapped_layers_are_no_obstacle() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = {"use_sliding_window": True, "sliding_window": 12, "layer_types": kinds}
    assert plan(**config).native == "qwen3_next"  # layer 3 stays, layers 0 and 2 are swapped
    with pytest.raises(UserError, match="layers 0, 2 keep a sliding window"):
        plan("layers=SL", **config)
    with pytest.raises(UserError, match="layers 3 keep a sliding window"):
        plan(family="qwen3_moe", use_sliding_window=True, sliding_window=12)


@pytest.mark.parametrize("family", [key for key in pico.KEYS if key not in ("qwen3", "qwen3_moe")])
def test_other_families_are_an_obstacle(family: str) -> None:
    with pytest.raises(
        UserError, match=f"qwen3_next: it can hold models made from qwen3 or qwen3_moe, not from {family}"
    ):
        plan("layers=[0]", family=family, num_hidden_layers=3)


def test_all_obstacles_are_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        plan("mixer.rope=both", "mixer.output.gate_bias=true", "kept.rope=false", attention_bias=True)
    assert str(caught.value).count("\n  qwen3_next: ") == 4


def test_an_adapter_that_stays_apart_is_an_obstacle() -> None:
    with pytest.raises(UserError, match="stages.1.lora.merge is false; set it to true, or leave export.native out"):
        plan("stages.1.lora.merge=false")
    assert plan("stages.1.lora.merge=false", "export.native=false").native is None


def test_every_native_is_an_architecture_of_transformers() -> None:
    for key in keys("natives"):
        assert type(AutoConfig.for_model(key)).model_type == key


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_it_reloads_in_a_clean_process_without_remote_code(
    student: Any, pico_tokenizer: Any, tmp_path: Path, family: str
) -> None:
    models = {"hybrid": student(family=family), "tied": student("LSLS", family, tie_word_embeddings=True)}
    folders = [export(model, pico_tokenizer, tmp_path / name, native=True) for name, model in models.items()]
    results = in_clean_process(tmp_path, folders)
    for (name, model), folder in zip(models.items(), folders, strict=True):
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "qwen3_next" and config["architectures"] == ["Qwen3NextForCausalLM"]
        assert config["tie_word_embeddings"] == ("lm_head.weight" not in weights(folder)) == (name == "tied")
        assert "auto_map" not in config and "linearize" not in config and not list(folder.glob("*.py"))
        assert torch.equal(results[f"{name}.logits"], logits(native_model(model)))
        torch.testing.assert_close(results[f"{name}.logits"], logits(model), atol=5e-5, rtol=0)
        ids = torch.randint(2, 97, (2, 25), generator=torch.Generator().manual_seed(2))
        greedy = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert torch.equal(results[f"{name}.greedy"], greedy)


def test_a_native_export_replaces_one_with_code(student: Any, tmp_path: Path) -> None:
    model = student()
    folder = export(model, None, tmp_path / "model")
    assert list(folder.glob("*.py"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, None, folder, native=True, max_shard_size="20KB")
    assert not list(folder.glob("*.py")) and len(list(folder.glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again), logits(native_model(model)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_no_native_is_not_written(converted: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="export.native: this model is no architecture"):
        export(converted("gdn", "LLLS", family="qwen3"), None, tmp_path / "model", native=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["layers.0.linear_attn.A_log", "layers.3.self_attn.q_proj.bias", "norm.weight"])
def test_logits_that_differ_are_refused(student: Any, name: str) -> None:
    model = student()
    made = native_model(model)
    tensor = made.model.get_parameter(name)
    tensor.data = tensor + 1 if "bias" not in name else -tensor
    with pytest.raises(
        UserError, match=r"on rows the logits of Qwen3NextForCausalLM in float32 differ .*; leave export"
    ):
        check(model, made)


def test_a_cache_and_padding_that_differ_are_refused(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = student()
    made, real = native_model(model), hf_native._logits

    def spoiled(where: tuple[Any, Any]) -> Any:
        def run(each: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            found = real(each, ids, mask)
            if each is made:
                found[where] += 9.0
            return found

        return run

    for where, what in (
        ((slice(1, None, 2), slice(-1)), "padded rows"),
        ((slice(0, None, 2), slice(-1, None)), "a token from the cache of rows"),
        ((slice(1, None, 2), slice(-1, None)), "a token from the cache of padded rows"),
    ):
        monkeypatch.setattr(hf_native, "_logits", spoiled(where))
        with pytest.raises(UserError, match=f"on {what} the logits"):
            check(model, made)


def rounded(model: Any, dtype: torch.dtype) -> Any:
    """The model with weights of this type; position embeddings stay as they are, as when it is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_half_precision_is_compared_in_float32(student: Any, dtype: torch.dtype, family: str) -> None:
    model = rounded(student(family=family), dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model.config._attn_implementation
    made = native_model(model)
    assert {p.dtype for p in [*made.parameters(), *model.parameters()]} == {dtype}
    assert model.config._attn_implementation == attention == made.config._attn_implementation
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    wide, ids = student(family=family), torch.arange(2, 60)[None]
    wide.load_state_dict({name: tensor.float() for name, tensor in before.items()})
    with torch.no_grad(), hf_native._in_float32(model):
        found = model(ids).logits
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wide(ids).logits, atol=1e-4, rtol=0)


def test_norms_that_bfloat16_cannot_hold_less_one_are_refused(student: Any) -> None:
    """0.005 - 1 rounds to -0.996 in bfloat16, a fifth too small; in float32 it is exact enough."""
    model = student()
    model.model.norm.weight.data.fill_(0.005)
    native_model(model)
    with pytest.raises(UserError, match=r"in bfloat16 differ .*; export in float32 .model.dtype: float32., or leave"):
        native_model(rounded(model, torch.bfloat16))


EVALUATION = {"windows": 2, "recall": False, "batch_size": 2, "split": "train", "lengths": [16]}


@pytest.fixture
def source(pico_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a source checkpoint of four layers."""
    monkeypatch.setattr("linearize.data.dataset.HF_HOME", str(tmp_path / "hf"))
    write_source(tmp_path, pico.pico_model("qwen3", **SWAPPED), pico_tokenizer)
    return tmp_path


def recipe(folder: Path, **sections: Any) -> Recipe:
    values: dict[str, Any] = {"layers": "LLLS", "mixer": {"type": "gdn", **NATIVE}, "export": {"native": True}}
    return make_recipe(folder, **{**values, **sections})


def test_a_conversion_from_end_to_end(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    out = convert(recipe(source, evaluation=EVALUATION, init={"type": "calibrated"}), source / "out", say=said.append)
    assert "as qwen3_next of transformers" in said[0]
    assert not list(out.glob("*.py"))
    model, tokenizer = linearize.load(out)
    assert type(model).__name__ == "Qwen3NextForCausalLM" and tokenizer.vocab_size == 97
    assert torch.isfinite(logits(model)).all()
    card = (out / "README.md").read_text()
    assert "It is a `qwen3_next` model of transformers and loads without `trust_remote_code`." in card
    assert "AutoModelForCausalLM.from_pretrained(path)\n" in card and "trust_remote_code=True" not in card
    points = dict(json.loads((out / "run" / "measurements.json").read_text()))
    text = str(source / "train.jsonl")
    report = linearize.evaluate(out, text=text, split="train", lengths=[16], windows=2, recall=False, device="cpu")
    assert report.teacher_model == str(source / "source") and report.teacher is not None
    assert report.student.losses[0].loss == pytest.approx(points["after finetune"]["losses"][0]["loss"], rel=1e-4)
    assert report.teacher.losses[0].loss == pytest.approx(points["teacher"]["losses"][0]["loss"], rel=1e-4)
    assert main(["generate", str(out), "--prompt", "the cat", "--device", "cpu"]) == 0
    assert main(["bench", str(out), "--device", "cpu"]) != 0
    assert "give a converted model, exported without export.native" in capsys.readouterr().err


def test_without_it_the_card_asks_for_remote_code(source: Path) -> None:
    out = convert(recipe(source, stages=[], export={}), source / "out", say=lambda text: None)
    assert list(out.glob("*.py")) and "trust_remote_code=True" in (out / "README.md").read_text()


def test_a_native_checkpoint_is_no_source(source: Path) -> None:
    out = convert(recipe(source, stages=[]), source / "out", say=lambda text: None)
    with pytest.raises(UserError, match="unknown family 'qwen3_next'.*the one that it was converted from"):
        plan_of(recipe(source, model={"name": str(out)}))


def test_what_its_check_refuses_ends_a_conversion_before_it_trains(
    source: Path, pico_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico.pico_model("qwen3", **SWAPPED).to(torch.bfloat16)
    model.model.norm.weight.data.fill_(0.005)
    write_source(source, model, pico_tokenizer)
    with pytest.raises(UserError, match="in bfloat16 differ"):
        convert(recipe(source), source / "out", say=lambda text: None)
    assert not list((source / "out" / "run").glob("*-*"))


def test_a_conversion_whose_native_export_failed_goes_on_without_it(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are trained by then; how they are written may change."""
    calls = iter([None, UserError("the logits differ")])

    def refuse(model: Any, made: Any) -> None:
        if (error := next(calls)) is not None:
            raise error

    monkeypatch.setattr(hf_native, "check", refuse)
    with pytest.raises(UserError, match="the logits differ"):
        convert(recipe(source), source / "out", say=lambda text: None)
    finished = (source / "out" / "run" / "1-finetune" / "result.safetensors").stat().st_mtime_ns
    out = convert(recipe(source, export={}), source / "out", resume=True, say=lambda text: None)
    assert (out / "run" / "1-finetune" / "result.safetensors").stat().st_mtime_ns == finished
    assert type(linearize.load(out)[0]).__name__ == "LinearizedQwen3ForCausalLM"
    assert Recipe.load(out / "recipe.yaml").export.native is False
    with pytest.raises(UserError, match="the recipe differs in seed"):
        convert(recipe(source, seed=3), source / "out", resume=True, say=lambda text: None)
