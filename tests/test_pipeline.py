"""A whole conversion of a pico model on disk: what it writes, what it measures, and errors before any weight moves."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from trainable import make_recipe, metrics, recipe_dict, write_source
from transformers import AutoModelForCausalLM

import linearize
from linearize import pipeline
from linearize.errors import UserError
from linearize.evals.held_out import eval_tokens
from linearize.evals.measure import measure
from linearize.hf.load import load, load_config
from linearize.pipeline import convert
from linearize.preflight import outline, plan_of
from linearize.recipe import Recipe

EVALUATION = {"windows": 2, "recall": False, "batch_size": 2, "split": "train", "lengths": [16]}


def quiet(text: str) -> None:
    pass


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same_weights(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_conversion_from_end_to_end(source: Path) -> None:
    said: list[str] = []
    recipe = make_recipe(source, evaluation=EVALUATION)
    (Path(recipe.model.name) / "LICENSE").write_text("PICO LICENSE\n")
    out = convert(recipe, source / "out", say=said.append)
    assert out == source / "out"
    assert (out / "LICENSE").read_text() == "PICO LICENSE\n"
    card = (out / "README.md").read_text()
    assert "license: other\n" in card and "license_name: pico-license\nlicense_link: LICENSE\n" in card
    assert said[0].startswith("source ") and "2 of 3 swapped: LSL" in said[0]
    assert said[-1] == f"checkpoint written to {out}"

    model, tokenizer = linearize.load(out)
    ids = torch.tensor([tokenizer.encode("the cat sat on a mat")])
    loaded = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.isfinite(logits).all() and torch.equal(loaded(ids).logits, logits)
    before = load_file(source / "source" / "model.safetensors")
    changed = {
        name for name, tensor in weights(out).items() if name not in before or not torch.equal(tensor, before[name])
    }
    assert {name.split(".mixer.")[0] for name in changed if ".mixer." in name} == {
        "model.layers.0.self_attn",
        "model.layers.2.self_attn",
    }
    assert {name.split(".")[-2] for name in changed if ".mixer." not in name} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }

    points = dict(json.loads((out / "run" / "measurements.json").read_text()))
    assert list(points) == ["teacher", "untrained", "after attention_transfer", "after finetune"]
    assert [point["tokens"] for point in points.values()] == [0, 0, 256, 512]
    assert 0 == points["untrained"]["seconds"] < points["after attention_transfer"]["seconds"]
    card = (out / "README.md").read_text()
    for name, point in points.items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} "))
        assert f"{point['losses'][0]['loss']:.3f}" in row
    assert "gap |" in card and "tokens so far |" in card and said[-2] in card
    assert recipe.to_yaml().strip() in card
    for stage in ("0-attention_transfer", "1-finetune"):
        assert [line["step"] for line in metrics(out / "run" / stage)] == [0, 1]
        assert (out / "run" / stage / "result.safetensors").exists()


def test_the_teacher_point_is_the_source_model(source: Path) -> None:
    recipe = make_recipe(source, evaluation=EVALUATION, stages=[])
    out = convert(recipe, source / "out", say=quiet)
    points = dict(json.loads((out / "run" / "measurements.json").read_text()))
    model, tokenizer = load(source / "source")
    text = eval_tokens(recipe.evaluation, tokenizer, recipe.data)
    expected = measure(model, tokenizer, recipe.evaluation, token_ids=text, seq_len=32)
    assert points["teacher"]["losses"][0]["loss"] == pytest.approx(expected.losses[0].loss, rel=1e-6)
    assert points["untrained"]["losses"][0]["loss"] != pytest.approx(expected.losses[0].loss, rel=1e-6)


def test_the_written_recipe_reproduces_the_checkpoint(source: Path) -> None:
    first = convert(make_recipe(source), source / "one", say=quiet)
    assert not (first / "run" / "measurements.json").exists()
    assert "Nothing was measured" in (first / "README.md").read_text()
    again = Recipe.load(first / "recipe.yaml")
    assert again == make_recipe(source)
    second = convert(again, source / "two", say=quiet)
    assert same_weights(first, second)
    other = convert(make_recipe(source, seed=1, stages=[]), source / "three", say=quiet)
    assert not same_weights(first, other)


def test_the_default_folder_is_named_after_model_and_mixer(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source)
    assert convert(make_recipe(source, stages=[]), say=quiet) == Path("source-lolcats")
    assert (source / "source-lolcats" / "config.json").exists()


def test_a_finished_conversion_resumes_without_training_or_measuring(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(source, evaluation=EVALUATION)
    out = convert(recipe, source / "out", say=quiet)
    before, points = weights(out), (out / "run" / "measurements.json").read_text()
    (out / "config.json").unlink()  # as if the export had been interrupted

    def forbidden(*args: Any, **options: Any) -> None:
        raise AssertionError("not again")

    monkeypatch.setattr("linearize.stages.base.train", forbidden)
    monkeypatch.setattr("linearize.evals.points.measure", forbidden)
    convert(recipe, out, resume=True, say=quiet)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(out).items())
    assert (out / "run" / "measurements.json").read_text() == points
    assert (out / "config.json").exists()


def test_seconds_of_a_resumed_conversion_count_the_finished_stages(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(source, evaluation=EVALUATION)

    def fails(self: Any, model: Any, batch: Any, weight: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("linearize.stages.finetune.Finetune.backward", fails)
        convert(recipe, source / "out", say=quiet)
    out = convert(recipe, source / "out", resume=True, say=quiet)
    points = dict(json.loads((out / "run" / "measurements.json").read_text()))
    assert points["after finetune"]["seconds"] > points["after attention_transfer"]["seconds"] > 0
    assert points["after finetune"]["tokens"] == 512


def test_an_adapter_that_is_not_merged_is_exported_beside_the_weights(source: Path) -> None:
    stages = [{"type": "finetune", "tokens": 256, "batch_size": 4, "lr": 1e-2, "lora": {"r": 2, "merge": False}}]
    out = convert(make_recipe(source, stages=stages), source / "out", say=quiet)
    ids = torch.arange(2, 40)[None]
    model, _ = linearize.load(out)
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    with torch.no_grad():
        assert (model(ids).logits - base).abs().max() > 1e-2
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, base)
    before = load_file(source / "source" / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(out).items() if name in before)


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"mixer": {"type": "lolcat"}}, "unknown mixer 'lolcat'; did you mean 'lolcats'"),
    ({"mixer": {"type": "lolcats", "windw": 8}}, "unknown key 'mixer.windw'; did you mean 'window'"),
    ({"layers": "LS"}, "pattern 'LS' has 2 letters and does not repeat evenly over 3 layers"),
    ({"layers": [0, 3]}, "\\[3\\] not in this model"),
    ({"model": {"name": "lama-3-8b"}}, "unknown model 'lama-3-8b'; did you mean 'llama-3-8b'"),
    ({"stages": [{"type": "finetune", "tokens": 10}]}, "stage finetune trains nothing"),
    ({"stages": [{"type": "finetune", "tokens": 10, "train": ["*.mixr.*"]}]}, "matches nothing that trains"),
    ({"stages": [{"type": "finetune", "tokens": 10, "lora": {"targets": ["qq"]}}]}, "unknown lora target 'qq'"),
    ({"mixer": {"type": "liger"}}, "nothing to train: Liger adds no parameters"),
]


@pytest.mark.parametrize(("sections", "message"), BROKEN)
def test_mistakes_in_a_recipe_end_it_before_weights_are_loaded_or_a_folder_made(
    source: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(pipeline, "load", lambda *args, **options: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=message):
        convert(Recipe.parse(recipe_dict(source, **sections)), source / "out", say=quiet)
    assert not (source / "out").exists()


def test_the_plan_leaves_no_trace_on_the_configuration(source: Path) -> None:
    recipe = make_recipe(source)
    assert str(plan_of(recipe)) == str(plan_of(recipe))
    assert load_config(str(source / "source")).model_type == "llama"


def test_missing_training_text_is_reported_before_anything_is_measured(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linearize.evals.points.measure", lambda *args, **options: pytest.fail("measured"))
    data = {"source": str(source / "absent.jsonl"), "seq_len": 32}
    with pytest.raises(UserError, match="absent.jsonl"):
        convert(make_recipe(source, data=data, evaluation={**EVALUATION, "text": "demo"}), source / "out", say=quiet)


def test_a_folder_in_use_is_left_alone(source: Path) -> None:
    recipe, out = make_recipe(source, stages=[]), source / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(UserError, match="was not made by this command; choose another with -o"):
            convert(recipe, out, resume=resume, say=quiet)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="was not made by"):
        convert(recipe, out / "thesis.tex", say=quiet)


def test_a_started_conversion_is_resumed_with_its_own_recipe_only(source: Path) -> None:
    recipe, out = make_recipe(source, stages=[]), source / "out"
    convert(recipe, out, say=quiet)
    assert yaml.safe_load((out / "run" / "recipe.yaml").read_text()) == recipe.model_dump(mode="json")
    with pytest.raises(UserError, match="holds a conversion \\(go on with --resume\\)"):
        convert(recipe, out, say=quiet)
    other = make_recipe(source, stages=[], seed=3, mixer={"type": "lolcats", "window": 4, "chunk_size": 16})
    with pytest.raises(UserError, match="differs in mixer.window \\(8 then, 4 now\\), seed \\(0 then, 3 now\\)"):
        convert(other, out, resume=True, say=quiet)
    convert(recipe, out, resume=True, say=quiet)


def test_resuming_nothing_is_said(source: Path) -> None:
    recipe, out, said = make_recipe(source, stages=[]), source / "out", []
    for _ in range(2):
        convert(recipe, out, resume=True, say=said.append)
    assert [text for text in said if "resume" in text] == [f"nothing to resume in {out}, so this is a new conversion"]


def test_a_path_may_be_written_otherwise_when_resuming(source: Path) -> None:
    recipe = make_recipe(source, stages=[])
    convert(recipe, source / "out", say=quiet)
    name = Path(recipe.model.name)
    again = make_recipe(source, stages=[], model={"name": str(name / ".." / name.name), "device": "cpu"})
    convert(again, source / "out", resume=True, say=quiet)
    shutil.copytree(name, source / "copy")
    with pytest.raises(UserError, match="differs in model.name"):
        other = make_recipe(source, stages=[], model={"name": str(source / "copy"), "device": "cpu"})
        convert(other, source / "out", resume=True, say=quiet)


def test_stages_of_one_type_are_numbered(source: Path) -> None:
    stage = {"type": "finetune", "tokens": 128, "batch_size": 4, "train": ["*.mixer.*"]}
    recipe = make_recipe(source, stages=[stage, {**stage, "seq_len": 16}], evaluation=EVALUATION)
    out = convert(recipe, source / "out", say=quiet)
    points = dict(json.loads((out / "run" / "measurements.json").read_text()))
    assert list(points) == ["teacher", "untrained", "after finetune 1", "after finetune 2"]
    assert [point["tokens"] for point in points.values()] == [0, 0, 128, 256]
    assert len(metrics(out / "run" / "1-finetune")) == 2, "half the sequence length, twice the steps"


def test_the_plan_tells_the_tokens_that_are_trained(source: Path) -> None:
    """Whole steps of batch x sequence, not what was asked for; 16 tokens a row in the second stage."""
    stage = {"type": "finetune", "tokens": 129, "batch_size": 4, "train": ["*.mixer.*"]}
    recipe = make_recipe(source, stages=[stage, {**stage, "tokens": 128, "seq_len": 16}], evaluation=EVALUATION)
    said: list[str] = []
    out = convert(recipe, source / "out", say=said.append)
    lines = said[0].splitlines()
    first, second = (line for line in lines if line.startswith("stage"))
    assert lines[lines.index(first) + 1] == "            train: ['*.mixer.*']", "what the recipe settled otherwise"
    assert first.startswith("stage       finetune: 256 tokens (129 asked for), 2 steps of 4 x 32, lr ")
    assert second.startswith("stage       finetune: 128 tokens, 2 steps of 4 x 16, lr ")
    points = json.loads((out / "run" / "measurements.json").read_text())
    assert points[-1][1]["tokens"] == 256 + 128 and points[-2][1]["tokens"] == 256


@pytest.mark.parametrize(("name", "folder"), [("auto", "demo-auto"), ("gdn", "demo-gdn"), ("mine.yaml", "demo-gdn")])
def test_the_default_folder_is_named_after_the_recipe(
    name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("extends: demo/auto\n")
    monkeypatch.setattr(pipeline, "_convert", lambda recipe, plan, out, *rest: out)
    assert convert(Recipe.load(name, "demo"), say=quiet) == Path(folder)


def test_the_plan_counts_both_replies_of_a_pair(source: Path) -> None:
    stage = {"type": "dpo", "tokens": 100, "batch_size": 2, "train": ["all"], "data": {"format": "preference"}}
    told = outline(recipe := make_recipe(source, stages=[stage]), plan_of(recipe))
    assert "dpo: 128 tokens (100 asked for), 1 step of 2 x 64, lr " in told


@pytest.mark.parametrize("init", ["declared", "calibrated"])
@pytest.mark.parametrize("stages", [0, 2])
def test_a_recipe_can_measure_teacher_and_finished_student_alone(source: Path, stages: int, init: str) -> None:
    stage = {"type": "finetune", "tokens": 128, "batch_size": 4, "train": ["*.mixer.*"]}
    evaluation = {**EVALUATION, "between": False}
    changes = {"mixer": {"type": "gdn"}, "init": {"type": init}, "stages": [stage] * stages}
    recipe = make_recipe(source, **changes, evaluation=evaluation)
    out = convert(recipe, source / "out", say=quiet)
    points = dict(json.loads((out / "run" / "measurements.json").read_text()))
    finished = "after finetune 2" if stages else {"declared": "untrained", "calibrated": "calibrated"}[init]
    assert list(points) == ["teacher", finished]
    assert points[finished]["tokens"] == 128 * stages


def test_a_start_that_was_killed_is_no_folder_in_use(source: Path) -> None:
    (source / "out" / "run").mkdir(parents=True)
    (source / "out" / "run" / ".recipe.yaml.partial").write_text("model:")
    out = convert(make_recipe(source, stages=[]), source / "out", say=quiet)
    assert (out / "config.json").exists()


def test_two_conversions_cannot_share_a_folder(source: Path) -> None:
    recipe, out = make_recipe(source, stages=[]), source / "out"
    convert(recipe, out, say=quiet)
    with pipeline.alone(out), pytest.raises(UserError, match="is in use by another running conversion"):
        convert(recipe, out, resume=True, say=quiet)
    convert(recipe, out, resume=True, say=quiet)


def test_a_conversion_that_has_just_begun_loses_nothing_to_another(source: Path) -> None:
    out = source / "out"
    with pipeline.alone(out):
        pipeline.claim(out, make_recipe(source, stages=[]), False)
        (out / "run" / "calibration.json").write_text("{}")
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for resume in (False, True):
            with pytest.raises(UserError, match="is in use by another running conversion; wait for it"):
                convert(make_recipe(source, stages=[], seed=3), out, resume=resume, say=quiet)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_output_folder_may_be_another_file_system(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "disk").mkdir()
    (source / "out").symlink_to(source / "disk")
    rename = os.replace

    def within_one_disk(before: Path, after: Path) -> None:
        disks = {(source / "disk") in Path(path).resolve().parents for path in (before, after)}
        if len(disks) > 1:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(before, after)

    monkeypatch.setattr("os.replace", within_one_disk)
    linearize.load(convert(make_recipe(source, stages=[]), source / "out", say=quiet))
    assert not (source / "disk" / ".partial").exists()


def test_lora_on_a_tied_head_is_refused_before_training(
    source: Path, pico_model: Callable[..., Any], pico_tokenizer: Any
) -> None:
    write_source(source, pico_model(tie_word_embeddings=True), pico_tokenizer)
    stages = [{"type": "finetune", "tokens": 128, "batch_size": 4, "lora": {"r": 2, "targets": ["lm_head"]}}]
    with pytest.raises(UserError, match="lora target 'lm_head' shares its weight with the input embeddings"):
        plan_of(make_recipe(source, stages=stages))


def test_an_impossible_chunk_size_is_named_by_the_plan(source: Path) -> None:
    mixer = {"type": "lolcats", "window": 8, "chunk_size": 3}
    with pytest.raises(UserError, match="mixer 'lolcats' cannot serve layer 0: .*power of two, got 3"):
        plan_of(make_recipe(source, mixer=mixer, stages=[]))


def test_a_start_that_failed_does_not_block_its_folder(source: Path) -> None:
    out, good = source / "out", recipe_dict(source, stages=[])
    bad = {**good, "data": {**good["data"], "source": "nowhere.txt"}, "stages": [{"type": "finetune", "tokens": 8}]}
    with pytest.raises(UserError):
        convert(Recipe.parse(bad), out, say=quiet)
    convert(Recipe.parse(good), out, say=quiet)
    assert (out / "config.json").is_file()


MISSING: list[tuple[dict[str, Any], str]] = [
    ({"evaluation": {**EVALUATION, "text": "/nope.txt"}}, "evaluation.text: .*'/nope.txt' does not exist"),
    ({"data": {"source": "absent.jsonl", "seq_len": 32}}, "'absent.jsonl' does not exist"),
    ({"evaluation": {**EVALUATION, "tasks": ["nosuchtask"]}}, "unknown lm-eval task 'nosuchtask'"),
]


@pytest.mark.parametrize(("sections", "message"), MISSING, ids=["text", "source", "task"])
def test_what_is_missing_is_named_before_weights_are_loaded(
    source: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(pipeline, "load", lambda *args, **options: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=message):
        convert(make_recipe(source, **sections), source / "out", say=quiet)
    assert not (source / "out").exists()


def test_a_text_that_is_too_short_is_named_before_weights_are_loaded(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load", lambda *args, **options: pytest.fail("weights were loaded"))
    text = source / "short.txt"
    text.write_text("abcdefg")
    for lengths, needed in (([4, 16], 16), ([], 32)):
        recipe = make_recipe(source, evaluation={**EVALUATION, "text": str(text), "lengths": lengths})
        with pytest.raises(UserError, match=f"evaluation text {text} has 8 tokens, fewer than one window of {needed};"):
            convert(recipe, source / "out", say=quiet)


def test_a_batch_that_does_not_divide_among_the_processes_is_known_before(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [{"type": "attention_transfer", "tokens": 64, "lr": 0.01, "batch_size": size} for size in (4, 3)]
    plan_of(recipe := make_recipe(source, stages=stages))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="batch_size 3 does not divide into 2 processes"):
        plan_of(recipe)


def test_a_sequence_that_no_memory_holds_is_refused(source: Path) -> None:
    stage = {"type": "attention_transfer", "tokens": 64, "lr": 0.01, "seq_len": 10**12}
    with pytest.raises(UserError, match="seq_len: .*less than or equal to 16777216"):
        plan_of(make_recipe(source, stages=[stage]))
