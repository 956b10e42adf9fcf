"""Every list of stages that ships runs on the demo teacher, a few steps of each, to a checkpoint that loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trainable import write_pairs

import linearize
from linearize.pipeline import convert
from linearize.recipe import Recipe
from linearize.recipe_files import available, read_recipe

TOKENS = 128
"""More than the usual windows of 64, which hold everything before."""


def distinct() -> list[str]:
    """The first default recipe with each list of stages and layers, but for those of other architectures."""
    found: dict[str, str] = {}
    for name, path in available().items():
        data = read_recipe(path)
        if name.startswith("default/") and not name.endswith("_encoder") and not data.get("export", {}).get("native"):
            found.setdefault(json.dumps([data["stages"], data["layers"]]), name)
    return list(found.values())


def short(name: str, folder: Path) -> Recipe:
    """The recipe on the demo's text, or on pairs in `folder`, two steps of one sequence or pair a stage."""
    data: dict[str, Any] = read_recipe(available()[name])
    stages = [{**stage, "tokens": 2 * TOKENS, "batch_size": 1, "micro_batch_size": None} for stage in data["stages"]]
    for stage in stages:
        if "seq_len" in stage:
            longer = 2 if stage["type"] == "long_context" else 1
            stage |= {"seq_len": longer * TOKENS, "tokens": 2 * longer * TOKENS}
        if stage["type"] == "dpo":
            pairs = {"source": str(write_pairs(folder / "pairs.jsonl")), "split": "train"}
            stage |= {"data": {**stage["data"], **pairs}, "tokens": 4 * TOKENS}
    text = {"source": "demo", "seq_len": TOKENS, "max_tokens": "20k"}
    layers = "LLS" if data["layers"] == "LLLS" else data["layers"]
    if isinstance(layers, dict):
        text["seq_len"] = 2 * TOKENS  # with room for a question beyond the window
        layers = {**layers, "tokens": 2 * TOKENS, "questions": 2, "facts": [1]}
        stages = [{**stage, "seq_len": TOKENS} for stage in stages]
    model = {"name": "demo", "dtype": "float32", "device": "cpu"}
    changes = {"model": model, "data": text, "stages": stages, "layers": layers, "evaluation": None}
    return Recipe.parse({**data, **changes, "init": {**data.get("init", {}), "tokens": TOKENS}})


def test_there_are_several() -> None:
    assert {
        "default/lolcats",
        "default/mohawk",
        "default/radlads",
        "default/halo",
        "default/mamba_in_llama_dpo",
    } <= set(distinct())


def test_preferences_follow_the_stages_of_mamba_in_llama() -> None:
    plain, whole = (Recipe.load(f"default/mamba_in_llama{end}", "owner/name") for end in ("", "_dpo"))
    assert whole.stages[:2] == plain.stages and [stage["type"] for stage in whole.stages[2:]] == ["dpo"]
    data = whole.stage_data(whole.stages[2])
    assert data.source == "HuggingFaceH4/ultrafeedback_binarized" and data.name is None and not data.streaming
    steps = 125_000_000 / (2 * 1024 * 32)
    assert 61_000 < 32 * steps < 61_135, "an epoch"


@pytest.mark.parametrize("name", distinct())
def test_a_named_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.data.dataset.HF_HOME", str(tmp_path / "home"))
    recipe = short(name, tmp_path)
    out = convert(recipe, tmp_path / "out", say=lambda text: None)
    for index, stage in enumerate(recipe.stages):
        lines = (out / "run" / f"{index}-{stage['type']}" / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 2 and all(json.loads(line)["grad_norm"] > 0 for line in lines)
    model, _ = linearize.load(out)
    with torch.no_grad():
        assert model(torch.arange(2, 40)[None]).logits.isfinite().all()
