"""Stages of one's own, `module:Class`, are checked as those that ship: in the plan, without changing the model."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from trainable import make_recipe, make_stage, metrics

from linearize import pipeline
from linearize.errors import UserError
from linearize.pipeline import convert
from linearize.preflight import plan_of
from linearize.stages.base import Stage
from linearize.training.config import TrainingConfig
from linearize.training.loop import Batch, Metrics


class OutsideConfig(TrainingConfig):
    lr: float = 1e-3
    train: list[str] = ["o"]


class Outside(Stage):
    """Trains output projections, and leaves a mark on the model that it prepares."""

    Config = OutsideConfig

    def prepare(self, model: Any) -> dict[str, nn.Parameter]:
        model.prepared = getattr(model, "prepared", 0) + 1
        return {name: p for name, p in model.named_parameters() if name.endswith("o_proj.weight")}

    def backward(self, model: Any, batch: Batch, weight: float) -> Metrics:
        loss = model(input_ids=batch["input_ids"], use_cache=False).logits.square().sum()
        (loss * weight).backward()
        return {"loss": loss.detach()}


class Nothing(Outside):
    """Trains nothing."""

    Config = OutsideConfig

    def prepare(self, model: Any) -> dict[str, nn.Parameter]:
        return {}


class Late(Outside):
    """Checks nothing itself before it runs."""

    Config = OutsideConfig

    def check(self, model: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ModuleType("my_stages")
    found.__dict__.update({"Outside": Outside, "Nothing": Nothing, "Late": Late})
    monkeypatch.setitem(sys.modules, "my_stages", found)


def settings(name: str = "Outside", **values: Any) -> dict[str, Any]:
    return {"type": f"my_stages:{name}", "tokens": 256, "batch_size": 4, **values}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": ["*.o_prj.*"]}, r"stage my_stages:Outside: train pattern '\*.o_prj.\*' matches nothing that trains"),
        (
            {"train": ["o", "mixer"]},
            r"train pattern '\*.mixer.\*' matches nothing that trains; names look like m",
        ),
        ({"lrs": {"q": 1e-3}}, "lrs pattern '.*q_proj.*' matches nothing that trains"),
        ({"unfreeze": {"*.mlp.*": 0.5}}, "unfreeze pattern '.*mlp.*' matches nothing that trains"),
        ({"unfreeze": {"o": 0.5}}, "unfreeze lets nothing train before 0.5 of the steps"),
        ({"name": "Nothing"}, "stage my_stages:Nothing trains nothing; remove it"),
    ],
)
def test_patterns_are_checked_by_the_plan(
    source: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(pipeline, "load", lambda *args, **options: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=message):
        plan_of(make_recipe(source, stages=[settings(**values)]))


def test_a_check_leaves_the_model_as_it_was(converted: Any) -> None:
    stage = Outside(OutsideConfig(**settings(lrs={"o": 1e-2})), make_stage("finetune", train=["o"]).family)
    with torch.device("meta"):
        model = converted("lolcats", "LSL").to("meta")
    before = [id(p) for p in model.parameters()]
    stage.check(model)
    assert not hasattr(model, "prepared") and [id(p) for p in model.parameters()] == before


def test_it_converts(source: Path) -> None:
    out = convert(make_recipe(source, stages=[settings(lrs={"o": 1e-2})]), source / "out", say=lambda text: None)
    assert len(metrics(out / "run" / "0-my_stages:Outside")) == 2


def test_what_checks_nothing_is_checked_when_it_begins(source: Path) -> None:
    recipe = make_recipe(source, stages=[settings("Late", lrs={"q": 1e-2})])
    plan_of(recipe)
    with pytest.raises(UserError, match="stage my_stages:Late: lrs pattern '.*q_proj.*' matches nothing that trains"):
        convert(recipe, source / "out", say=lambda text: None)
