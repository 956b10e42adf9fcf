"""Queries and keys of softmax layers are the source's again, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from trainable import dataset, make_recipe, make_stage, metrics, snapshot, write_source

import linearize
from linearize.errors import UserError
from linearize.families.base import Family
from linearize.pipeline import convert
from linearize.preflight import plan_of
from linearize.registry import find, keys
from linearize.stages.qk_restore import QKRestore, query_key_elements
from linearize.swap import teacher_path

IDS = torch.arange(2, 42)[None]


def restorer() -> QKRestore:
    family = find("families", "llama", Family)
    return QKRestore(QKRestore.Config.model_validate({"type": "qk_restore"}), family)


@pytest.mark.parametrize("what", [{"train": ["*"]}, {"lora": {"r": 4}}], ids=["full", "lora"])
def test_it_restores_queries_and_keys_of_kept_layers_alone(
    converted: Callable[..., Any], pico_model: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, what: Any
) -> None:
    data = dataset(tmp_path, pico_tokenizer)
    model, again = converted("gdn", "LSL"), converted("gdn", "LSL")
    source = snapshot(model)
    tune = {"steps": 3, "lr": 1e-2, **what}
    make_stage("finetune", **tune).run(model, data, tmp_path / "tune", keep_source=True)
    tuned = snapshot(model)
    assert restorer().run(model, None, tmp_path / "restore") == 0.0
    restored = {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qk"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (source if name in restored else tuned)[name]), name
        if name in restored:
            assert not torch.equal(tuned[name], source[name]), "the test can fail"
    make_stage("finetune", **tune).run(again, data, tmp_path / "tune", resume=True, keep_source=True)
    restorer().run(again, None, tmp_path / "restore", resume=True)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        with teacher_path(model):
            assert torch.equal(model(IDS).logits, pico_model()(IDS).logits)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("key", [key for key in keys("families") if key != "bert"])
def test_the_elements_are_those_that_change_queries_or_keys(key: str) -> None:
    """Each element is moved, and queries and keys looked at; those found must be exactly those that matter."""
    model = pico.pico_model(key).double()
    family = find("families", key, Family).of(model.config, lambda package, name: find(package, name, Family))
    attn = next(iter(family.attentions(model).values()))
    width = family.shape(model.config, 0).hidden_size
    x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0)).double()

    def made() -> torch.Tensor:
        q, k, _ = family.project(attn, x)
        q, k = family.normed(attn, q, k)
        return torch.cat([q.flatten(), k.flatten()])

    found = dict(query_key_elements(attn, family, width))
    assert found
    with torch.no_grad():
        before = made()
        for name, p in attn.named_parameters():
            mask = found.get(p, torch.zeros_like(p, dtype=torch.bool))
            kept, noise = p.data.clone(), torch.rand(p.shape, generator=torch.Generator().manual_seed(1)).to(p) + 0.1
            p.copy_(torch.where(mask, kept, kept + noise))
            assert torch.equal(made(), before), f"{name}: what was not found makes queries or keys"
            for index in mask.nonzero()[:: max(1, int(mask.sum()) // 7)]:
                p.copy_(kept)
                p[tuple(index)] += 0.5
                assert not torch.equal(made(), before), f"{name}{index.tolist()} makes neither queries nor keys"
            p.copy_(kept)


def test_without_a_kept_layer_it_is_refused(converted: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"no layer keeps its softmax attention.*layers: LLLS"):
        restorer().check(converted("gdn", "LLL"))


def test_it_has_no_settings_of_training() -> None:
    with pytest.raises(ValueError, match="tokens"):
        QKRestore.Config.model_validate({"type": "qk_restore", "tokens": 5})


def test_a_conversion_with_it(
    pico_model: Any, pico_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linearize.data.dataset.HF_HOME", str(tmp_path / "hf"))
    write_source(tmp_path, pico_model(), pico_tokenizer)
    tune = {"type": "finetune", "tokens": 256, "batch_size": 4, "lr": 1e-2, "train": ["*"]}
    evaluation = {"windows": 1, "recall": False, "branches": False, "divergence": False, "split": "train"}
    stages = [tune, {"type": "qk_restore"}, tune]
    said: list[str] = []
    out = convert(make_recipe(tmp_path, stages=stages[:2], evaluation=evaluation), tmp_path / "out", say=said.append)
    assert "stage       qk_restore: no training" in said[0]
    points = dict(json.loads((out / "run" / "measurements.json").read_text()))
    assert points["after qk_restore"]["tokens"] == points["after finetune"]["tokens"] == 256
    model, source = linearize.load(out)[0].state_dict(), pico_model().state_dict()
    for name in "qkvo":
        place = f"model.layers.1.self_attn.{name}_proj.weight"
        assert torch.equal(model[place], source[place]) == (name in "qk"), name
    longer = make_recipe(tmp_path, stages=stages)
    again = convert(longer, tmp_path / "again", say=said.append)
    assert len(metrics(again / "run" / "2-finetune")) == 2
    (again / "config.json").unlink()
    before = linearize.load(convert(longer, again, resume=True, say=said.append))[0].state_dict()
    assert all(tensor.isfinite().all() for tensor in before.values())
    with pytest.raises(UserError, match="no layer keeps its softmax attention"):
        plan_of(make_recipe(tmp_path, stages=stages, layers="all"))
