"""What a resumed conversion may change, what it starts anew, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from trainable import make_recipe, metrics, write_documents

from linearize.errors import UserError
from linearize.origins import weights_digest
from linearize.pipeline import convert
from linearize.recipe import Recipe

FIRST = {"type": "attention_transfer", "tokens": 256, "batch_size": 4}
SECOND = {"type": "finetune", "tokens": 512, "batch_size": 4, "lr": 1e-3, "lora": {"r": 2}}
EVALUATION = {"windows": 1, "recall": False, "branches": False, "divergence": False, "split": "train", "lengths": [16]}


def recipe_of(source: Path, first: dict[str, Any] | None = None, **second: Any) -> Recipe:
    return make_recipe(source, stages=[{**FIRST, **(first or {})}, {**SECOND, **second}])


def stopped(recipe: Recipe, out: Path, after: int = 3) -> Path:
    """A conversion whose second stage is interrupted in its step `after`, counted from 0."""
    from linearize.stages.finetune import Finetune

    steps, backward = [], Finetune.backward

    def stops(self: Any, model: Any, batch: Any, weight: float) -> Any:
        steps.append(1)
        if len(steps) > after:
            raise KeyboardInterrupt
        return backward(self, model, batch, weight)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Finetune, "backward", stops)
        convert(recipe, out, say=lambda text: None)
    return out


def same_weights(one: Path, two: Path) -> bool:
    a, b = (load_file(out / "model.safetensors") for out in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_stage_that_failed_is_tried_again_with_other_settings(source: Path) -> None:
    out, said = source / "out", []
    with pytest.raises(UserError, match="Lower lr, .*go on with --resume"):
        convert(recipe_of(source, lr=1e30, clip=None, precision="fp32"), out, say=said.append)
    good = recipe_of(source, lr=1e-3, precision="fp32")
    began = (out / "run" / "0-attention_transfer" / "result.safetensors").stat().st_mtime_ns
    convert(good, out, resume=True, say=said.append)
    assert (out / "run" / "0-attention_transfer" / "result.safetensors").stat().st_mtime_ns == began
    assert yaml.safe_load((out / "run" / "recipe.yaml").read_text()) == good.model_dump(mode="json")
    assert same_weights(out, convert(good, source / "whole", say=said.append))


def test_checkpoints_of_other_settings_are_not_continued_from(source: Path) -> None:
    out, said = stopped(recipe_of(source, checkpoint_every=1), source / "out"), []
    assert list((out / "run" / "1-finetune").glob("step-*"))
    changed = recipe_of(source, checkpoint_every=1, lr=5e-4)
    convert(changed, out, resume=True, say=said.append)
    assert any("the settings of stage 1-finetune changed, so it starts anew" in text for text in said)
    assert [line["step"] for line in metrics(out / "run" / "1-finetune")] == [0, 1, 2, 3]
    assert same_weights(out, convert(changed, source / "whole", say=said.append))


def test_keys_without_effect_on_results_change_and_checkpoints_stay(source: Path) -> None:
    out, said = stopped(recipe_of(source, checkpoint_every=1), source / "out"), []
    changed = recipe_of(source, {"log_every": 2}, checkpoint_every=50, head_chunk=64)
    convert(changed, out, resume=True, say=said.append)
    assert not any("anew" in text for text in said)
    assert yaml.safe_load((out / "run" / "recipe.yaml").read_text()) == changed.model_dump(mode="json")
    assert same_weights(out, convert(recipe_of(source), source / "whole", say=said.append))


def test_what_results_come_from_does_not_change(source: Path) -> None:
    out = stopped(recipe_of(source), source / "out")
    before = (out / "run" / "recipe.yaml").read_text()
    with pytest.raises(
        UserError, match="differs in stages.0.lr .*What may change is stages.1 without a result"
    ) as told:
        convert(recipe_of(source, {"lr": 1e-4}, lr=1e-4), out, resume=True, say=lambda text: None)
    assert "stages.*.micro_batch_size" in str(told.value) and "export" in str(told.value)
    assert "stages.1.lr" not in str(told.value)
    assert (out / "run" / "recipe.yaml").read_text() == before


def test_the_message_names_what_may_change_once_all_stages_have_results(source: Path) -> None:
    out = convert(recipe_of(source), source / "out", say=lambda text: None)
    with pytest.raises(UserError, match="What may change is what has no effect on results: "):
        convert(recipe_of(source, lr=2e-3), out, resume=True, say=lambda text: None)


def test_another_stage_takes_the_place_of_one_without_a_result(source: Path) -> None:
    sections = {"evaluation": EVALUATION}
    out = stopped(make_recipe(source, stages=[FIRST, SECOND], **sections), source / "out")
    changed = make_recipe(source, stages=[FIRST, FIRST], **sections)
    convert(changed, out, resume=True, say=lambda text: None)
    assert not (out / "run" / "1-finetune").exists()
    points = [name for name, _ in json.loads((out / "run" / "measurements.json").read_text())]
    assert points == ["teacher", "untrained", "after attention_transfer 1", "after attention_transfer 2"]
    with pytest.raises(UserError, match="differs in stages.1.type"):
        convert(make_recipe(source, stages=[FIRST], **sections), out, resume=True, say=lambda text: None)


@pytest.mark.parametrize("after", [0, 2], ids=["not begun", "begun"])
def test_changed_training_data_are_refused(source: Path, after: int) -> None:
    recipe = recipe_of(source, checkpoint_every=1)
    out, file = stopped(recipe, source / "out", after), source / "train.jsonl"
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:60]))
    with pytest.raises(UserError, match="training data changed since .*train.jsonl.*put it back as it was"):
        convert(recipe, out, resume=True, say=lambda text: None)
    file.write_text(whole)  # at another time, but the same rows
    convert(recipe, out, resume=True, say=lambda text: None)
    file.write_text("".join(whole.splitlines(keepends=True)[:60]))
    convert(recipe, out, resume=True, say=lambda text: None)  # nothing is left to train


@pytest.mark.parametrize("after", [0, 2], ids=["not begun", "begun"])
def test_changed_data_of_a_calibration_are_refused(source: Path, after: int) -> None:
    write_documents(source / "other.jsonl", seed=1)
    tune = {**SECOND, "checkpoint_every": 1, "train": ["o"], "lora": None}  # what was calibrated stays in the result
    stages = [{**tune, "data": {"source": str(source / "other.jsonl")}}]
    recipe = make_recipe(source, mixer="gdn", init={"type": "calibrated", "tokens": 64}, stages=stages)
    out, file = stopped(recipe, source / "out", after), source / "train.jsonl"
    whole = file.read_text()
    changed = "".join(reversed(whole.splitlines(keepends=True)))
    file.write_text(changed)
    with pytest.raises(UserError, match="data of the calibration .init. changed since .*train.jsonl.*put it back as"):
        convert(recipe, out, resume=True, say=lambda text: None)
    file.write_text(whole)
    convert(recipe, out, resume=True, say=lambda text: None)
    assert same_weights(out, convert(recipe, source / "whole", say=lambda text: None))
    file.write_text(changed)
    convert(recipe, out, resume=True, say=lambda text: None)  # nothing is left to do
    (out / "model.safetensors").unlink()
    with pytest.raises(UserError, match="data of the calibration"):
        convert(recipe, out, resume=True, say=lambda text: None)
    assert not same_weights(source / "whole", convert(recipe, source / "changed", say=lambda text: None))


def test_another_source_model_is_refused(source: Path) -> None:
    recipe = recipe_of(source, checkpoint_every=1)
    out, name = stopped(recipe, source / "out"), recipe.model.name
    file = Path(name) / "model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    save_file({key: tensor + 1e-3 for key, tensor in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="weights of the source, model.name=.* are others than when .* put them back"):
        convert(recipe, out, resume=True, say=lambda text: None)
    file.write_bytes(whole)
    convert(recipe, out, resume=True, say=lambda text: None)
    assert same_weights(out, convert(recipe, source / "whole", say=lambda text: None))
    save_file({key: tensor + 1e-3 for key, tensor in tensors.items()}, file, {"format": "pt"})
    convert(recipe, out, resume=True, say=lambda text: None)  # nothing is left to do


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digest_of_weights_sees_each_tensor_its_type_and_name(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(100, 100).to(dtype)
    digest = weights_digest(layer)
    assert weights_digest(copy.deepcopy(layer)) == digest
    with torch.no_grad():
        layer.bias[7] += 1
    changed = {digest, weights_digest(layer), weights_digest(layer.half()), weights_digest(torch.nn.Sequential(layer))}
    assert len(changed) == 4


def test_a_calibration_that_nothing_followed_is_made_anew(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(source, mixer="gdn", init={"type": "calibrated", "tokens": 64}, stages=[])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("linearize.pipeline.export", interrupted)
        convert(recipe, source / "out", say=lambda text: None)
    write_documents(source / "train.jsonl", seed=1)
    convert(recipe, source / "out", resume=True, say=lambda text: None)
    assert same_weights(source / "out", convert(recipe, source / "whole", say=lambda text: None))


def interrupted(*args: Any, **options: Any) -> None:
    raise KeyboardInterrupt


def test_the_digest_of_prepared_data_is_of_their_rows(pico_tokenizer: Any, tmp_path: Path) -> None:
    from linearize.data import DataConfig, prepare

    def content(seed: int, place: str) -> str:
        config = DataConfig(source=str(write_documents(tmp_path / f"{place}.jsonl", seed=seed)), seq_len=32)
        return prepare(config, pico_tokenizer, cache_dir=tmp_path / "cache").content

    assert content(0, "a") == content(0, "b") != content(1, "c")


def test_a_finished_conversion_is_left_as_it_is(source: Path) -> None:
    out, said = convert(recipe_of(source), source / "out", say=lambda text: None), []
    (out / "README.md").write_text("my own words")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.is_file()}
    convert(recipe_of(source), out, resume=True, say=said.append)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir() if path.is_file()} == before
    assert said[-1] == f"the checkpoint in {out} is complete, and was left as it is"
    (out / "model.safetensors").unlink()
    convert(recipe_of(source), out, resume=True, say=said.append)
    assert (out / "model.safetensors").exists() and said[-1] == f"checkpoint written to {out}"


def test_a_damaged_recipe_is_an_error_that_says_what_to_do(source: Path) -> None:
    out = stopped(recipe_of(source), source / "out")
    (out / "run" / "recipe.yaml").write_text("model: [")
    with pytest.raises(
        UserError, match="run/recipe.yaml is not valid YAML .*restore it, or convert into another folder"
    ):
        convert(recipe_of(source), out, resume=True, say=lambda text: None)
