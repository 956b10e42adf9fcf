"""What changes in the course of a stage: averaged weights, parts that train later, windows that drop out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_loop import killed, same
from trainable import dataset, make_stage, metrics, snapshot

from linearize.errors import UserError
from linearize.swap import swapped
from linearize.training.optim import Average

FULL = {"train": ["*"], "lr": 1e-3, "schedule": "constant", "warmup": 0.0}


@pytest.fixture
def data(tmp_path: Path, pico_tokenizer: Any) -> Any:
    return dataset(tmp_path, pico_tokenizer)


def test_an_average_is_the_recursion_written_out() -> None:
    p = {"w": torch.nn.Parameter(torch.zeros(3))}
    average, expected = Average(0.5, p), torch.zeros(3)
    for step in range(12):
        p["w"].data += torch.tensor([1.0, step, -2.0])
        average.update(step, p)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * p["w"].data
    torch.testing.assert_close(average.values["w"], expected)
    average.copy_to(p)
    torch.testing.assert_close(p["w"].data, expected)


def test_the_result_is_the_average_of_the_weights_after_each_step(
    converted: Callable[..., Any], data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    plain, averaged = converted("lolcats"), converted("lolcats")
    name = "model.layers.0.self_attn.q_proj.weight"
    update = Average.update

    def spy(self: Average, step: int, parameters: Any) -> None:
        seen.append(parameters[name].detach().clone())
        update(self, step, parameters)

    monkeypatch.setattr(Average, "update", spy)
    expected = averaged.state_dict()[name].clone()
    make_stage("finetune", steps=6, **FULL).run(plain, data, tmp_path / "plain")
    make_stage("finetune", steps=6, ema=0.9, **FULL).run(averaged, data, tmp_path / "averaged")
    assert len(seen) == 6
    assert torch.equal(seen[-1], plain.state_dict()[name]), "the training itself is not changed"
    for step, weight in enumerate(seen):
        expected = torch.lerp(expected, weight, 1 - min(0.9, (1 + step) / (10 + step)))
    torch.testing.assert_close(averaged.state_dict()[name], expected)
    assert not torch.equal(expected, seen[-1])


@pytest.mark.parametrize(
    "settings",
    [{"ema": 0.9}, {"unfreeze": {"*.mlp.*": 0.6}}, {"window_dropout": [1.0, 0.5, 0.0]}],
    ids=["ema", "unfreeze", "window_dropout"],
)
def test_a_killed_run_resumes_to_the_same_bits(
    converted: Callable[..., Any], data: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = {"steps": 9, "checkpoint_every": 2, **FULL, **settings}
    straight, resumed = converted("lolcats"), converted("lolcats")
    make_stage("finetune", **settings).run(straight, data, tmp_path / "straight")
    with killed(5):
        make_stage("finetune", **settings).run(converted("lolcats"), data, tmp_path / "killed")
    make_stage("finetune", **settings).run(resumed, data, tmp_path / "killed", resume=True)
    same(straight, resumed)


def test_parts_begin_to_train_when_they_are_told_to(
    converted: Callable[..., Any], data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted("lolcats", "LSL")
    before, first = snapshot(model), {}
    unfreeze = {"model.layers.*": 0.25, "model.layers.0.*": 0.75}
    stage = make_stage("finetune", steps=8, unfreeze=unfreeze, **FULL)
    at = stage.at

    def spy(model: Any, parameters: Any, done: float) -> None:
        for name, p in parameters.items():
            if name not in first and not torch.equal(p, before[name]):
                first[name] = round(done * 8)
        at(model, parameters, done)

    monkeypatch.setattr(stage, "at", spy)
    stage.run(model, data, tmp_path / "run")
    for name, step in first.items():
        late = 6 if name.startswith("model.layers.0.") else 2 if name.startswith("model.layers.") else 0
        assert step == late + 1, name
    assert {"lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"} <= set(first)
    assert not any(p.requires_grad for p in model.parameters())


def test_windows_drop_out_as_often_as_they_are_told_to(
    converted: Callable[..., Any], data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, off = converted("lolcats"), []
    stage = make_stage("finetune", steps=60, window_dropout=[1.0, 0.5, 0.0], gradient_checkpointing=True, **FULL)
    backward = stage.backward

    def spy(*args: Any) -> Any:
        off.append([bool(attn.mixer.disabled) for attn in swapped(model).values()])
        return backward(*args)

    monkeypatch.setattr(stage, "backward", spy)
    stage.run(model, data, tmp_path / "run")
    assert all(all(layers) for layers in off[:20]) and not any(any(layers) for layers in off[40:])
    middle = [x for layers in off[20:40] for x in layers]
    assert 0.25 < sum(middle) / len(middle) < 0.75
    assert any(len(set(layers)) == 2 for layers in off[20:40]), "each layer has its own chance"
    assert not any(attn.mixer.disabled for attn in swapped(model).values())
    assert metrics(tmp_path / "run")[-1]["loss"] < metrics(tmp_path / "run")[0]["loss"]


@pytest.mark.parametrize(
    ("mixer", "settings", "message"),
    [
        ("gdn", {"window_dropout": [0.5]}, "window_dropout finds no window; leave it out, or set mixer.window"),
        ("gdn", {"unfreeze": {"*.mlb.*": 0.5}}, "unfreeze pattern '\\*.mlb.\\*' matches nothing that trains"),
        ("gdn", {"lrs": {"*.mlb.*": 0.5}}, "lrs pattern '\\*.mlb.\\*' matches nothing that trains"),
    ],
)
def test_what_would_change_nothing_is_refused(
    converted: Callable[..., Any], mixer: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_stage("finetune", **FULL, **settings).check(converted(mixer))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_dropout": [1.5]}, "chances must lie between 0 and 1, got 1.5"),
        ({"unfreeze": {"*": 1.0}}, "shares must lie from 0 to less than 1"),
        ({"lrs": {"*": 0.0}}, "rates must be greater than 0"),
    ],
)
def test_values_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_stage("finetune", **FULL, **settings)
