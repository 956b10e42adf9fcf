"""What changes in the course of a stage: averaged weights, parts that train later, windows that drop out."""

from __future__ import annotations

import copy
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


@pytest.mark.parametrize("key", ["attention_transfer", "matrix_align", "hidden_align"])
@pytest.mark.parametrize("late", [False, True])
def test_layers_in_which_nothing_trains_are_passed_over(
    converted: Callable[..., Any], data: Any, tmp_path: Path, key: str, late: bool
) -> None:
    model = converted("lolcats", "LSL")
    before = snapshot(model)
    first, last = "model.layers.0.*.mixer.*", "model.layers.2.*.mixer.*"
    settings = {"train": [first, last], "unfreeze": {last: 0.5}} if late else {"train": [first]}
    make_stage(key, steps=4, lr=1e-2, **settings).run(model, data, tmp_path / "run")
    changed = {name.split(".")[2] for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == ({"0", "2"} if late else {"0"})
    lines = metrics(tmp_path / "run")
    assert ["layer_2" in line for line in lines] == [late and step >= 2 for step in range(4)]
    assert all("layer_0" in line for line in lines)


@pytest.mark.parametrize("key", ["attention_transfer", "matrix_align", "hidden_align", "finetune"])
def test_something_trains_from_the_start(converted: Callable[..., Any], key: str) -> None:
    unfreeze = {"mixer": 0.5, "model.layers.0.*": 0.25}
    with torch.device("meta"):
        model = converted("lolcats", "LSL").to("meta")
    with pytest.raises(UserError, match="unfreeze lets nothing train before 0.25 of the steps; leave a pattern out"):
        make_stage(key, train=["mixer"], unfreeze=unfreeze).check(model)


def test_a_stage_that_compares_what_comes_before_all_that_trains(
    converted: Callable[..., Any], data: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="depends on nothing that trains"):
        make_stage("attention_transfer", train=["o"]).run(converted("lolcats"), data, tmp_path / "run")


@pytest.mark.parametrize("dora", [False, True])
def test_patterns_mean_the_same_parameters_where_an_adapter_is(converted: Callable[..., Any], dora: bool) -> None:
    model = converted("lolcats", "LSL")
    lrs = {"*.q_proj.weight": 0.5, "*.v_proj.lora_*": 0.25}
    unfreeze = {"*.q_proj.weight": 0.5}
    if dora:
        lrs["*.o_proj.lora_magnitude*"] = 0.125
    stage = make_stage(
        "finetune", train=["q", "mixer"], lora={"r": 2, "dora": dora}, lr=1.0, lrs=lrs, unfreeze=unfreeze
    )
    stage.check(model)
    _, parameters = stage.begin(model)
    stage.at(model, parameters, 0.0)
    base = [name for name in parameters if name.endswith("q_proj.base_layer.weight")]
    assert len(base) == 3 and not any(parameters[name].requires_grad for name in base)
    assert {stage.lr_scale(name) for name in base} == {0.5}
    assert {stage.lr_scale(name) for name in parameters if ".v_proj.lora_" in name} == {0.25}
    magnitudes = [name for name in parameters if ".o_proj.lora_magnitude" in name]
    assert [stage.lr_scale(name) for name in magnitudes] == ([0.125] * 3 if dora else [])
    stage.at(model, parameters, 0.5)
    assert all(p.requires_grad for p in parameters.values())


@pytest.mark.parametrize("dora", [False, True])
def test_a_pattern_of_magnitudes_needs_dora(converted: Callable[..., Any], dora: bool) -> None:
    stage = make_stage("finetune", lora={"r": 2, "dora": dora}, lrs={"*.lora_magnitude*": 1e-3})
    if dora:
        return stage.check(converted("lolcats"))
    with pytest.raises(UserError, match="lrs pattern '.*lora_magnitude.' matches nothing that trains"):
        stage.check(converted("lolcats"))


COMBINE = ["*.mixer.combine.*"]


@pytest.mark.parametrize(
    ("mixer", "settings"),
    [
        ("lolcats", {"train": COMBINE, "window_dropout": [1.0]}),
        ("lolcats", {"train": COMBINE, "window_dropout": [0.0, 0.5]}),
        ("lizard", {"train": ["*.mixer.local.*"], "window_dropout": [1.0]}),
        ("mlstm_swa", {"train": COMBINE, "window_dropout": [0.9, 0.75, 0.5]}),
        ("still", {"train": COMBINE, "window_dropout": [1.0, 0.0]}),
        ("linearized_llm", {"train": COMBINE, "window_dropout": [1.0]}),
        ("lolcats", {"train": ["mixer"], "unfreeze": {"*.map_*": 0.25}, "window_dropout": [0.5, 0.0]}),
        ("lolcats", {"train": [*COMBINE, "q"], "unfreeze": {"q": 0.75}, "window_dropout": [0.0, 1.0]}),
    ],
)
def test_windows_that_drop_out_with_all_that_trains_are_refused(
    converted: Callable[..., Any], data: Any, tmp_path: Path, mixer: str, settings: dict[str, Any]
) -> None:
    model = converted(mixer)
    settings = {"steps": 8, **FULL, **settings}
    message = (
        r"stage finetune: window_dropout \S+ can switch all windows off, and what trains after \S+ of the steps gets no"
    )
    for made in (model, copy.deepcopy(model).to("meta")):
        with pytest.raises(UserError, match=message):
            make_stage("finetune", **settings).check(made)
    with pytest.raises(UserError, match=message):
        make_stage("finetune", **settings).run(model, data, tmp_path / "run")


@pytest.mark.parametrize(
    ("mixer", "settings"),
    [
        ("lolcats", {"train": ["mixer"], "window_dropout": [1.0]}),
        ("lolcats", {"train": [*COMBINE, "*.mixer.map_k.*"], "window_dropout": [1.0]}),
        ("lolcats", {"train": [*COMBINE, "o"], "window_dropout": [1.0]}),
        ("lolcats", {"train": COMBINE, "lora": {"r": 2, "targets": ["k"]}, "window_dropout": [1.0]}),
        ("lolcats", {"train": COMBINE, "window_dropout": [0.0]}),
        ("lolcats", {"train": ["mixer"], "unfreeze": {"*.map_*": 0.5}, "window_dropout": [0.0, 0.5]}),
        ("lizard", {"train": ["*.mixer.*"], "window_dropout": [1.0]}),
    ],
)
def test_what_learns_without_its_windows_is_not_refused(
    converted: Callable[..., Any], data: Any, tmp_path: Path, mixer: str, settings: dict[str, Any]
) -> None:
    make_stage("finetune", **{"steps": 4, **FULL, **settings}).run(converted(mixer), data, tmp_path / "run")
    assert all(line["grad_norm"] > 0 for line in metrics(tmp_path / "run"))
