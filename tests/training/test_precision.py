"""Half-precision models: float32 computes what a float32 model would, and only what trained is changed by it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import generic
from trainable import dataset, make_stage, metrics, snapshot

from linearize.bench_training import time_stages
from linearize.registry import find, keys
from linearize.stages.base import Stage
from linearize.swap import source_weights
from linearize.training.precision import float32_weights

STAGES = [key for key in keys("stages") if find("stages", key, Stage).trains]


def half(model: Any) -> Any:
    """The model with bfloat16 parameters, as loading makes them; buffers stay float32."""
    for p in model.parameters():
        p.data = p.data.bfloat16()
    return model


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
@pytest.mark.parametrize("key", STAGES)
def test_every_stage_trains_a_bfloat16_model(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, key: str, precision: str
) -> None:
    data = dataset(tmp_path, pico_tokenizer)
    model = half(converted("lolcats", "LSL"))
    before, single = snapshot(model), copy.deepcopy(model).float()
    settings = {"steps": 2, "precision": precision, "warmup": 0.0, **generic(key)}
    settings |= {"train": ["mixer", "q"]} if "lora" not in settings else {}
    make_stage(key, **settings).run(model, data, tmp_path / "half", keep_source=True)
    after = model.state_dict()
    assert {name: t.dtype for name, t in after.items()} == {name: t.dtype for name, t in before.items()}
    changed = {
        name.split("self_attn.")[-1].split(".")[0] for name in after if not torch.equal(after[name], before[name])
    }
    assert changed == ({"mixer", "q_proj", "k_proj", "v_proj", "o_proj"} if "lora" in settings else {"mixer", "q_proj"})
    if precision != "bf16":  # the first step sees the same weights as in a float32 model, and computes the same
        make_stage(key, **settings).run(single, data, tmp_path / "single", keep_source=True)
        losses = [metrics(tmp_path / run)[0]["loss"] for run in ("half", "single")]
        assert losses[0] == losses[1]


@pytest.mark.parametrize("key", STAGES)
def test_no_stage_runs_its_backward_pass_under_autocast(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There even products of float32 operators would have gradients of bfloat16."""
    seen, original = [], torch.Tensor.backward

    def backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        seen.append(torch.is_autocast_enabled("cpu"))
        original(loss, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    settings = {"steps": 1, "precision": "bf16", **generic(key)}
    make_stage(key, **settings).run(converted("lolcats", "LSL"), dataset(tmp_path, pico_tokenizer), tmp_path / "run")
    assert seen and not any(seen)


def test_a_trained_source_weight_stays_the_teachers_in_later_stages(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path
) -> None:
    """Kept values take the types of their parameters, and come back as they were."""
    data = dataset(tmp_path, pico_tokenizer)
    model = half(converted("lolcats", "LSL"))
    before = snapshot(model)
    for index, key in enumerate(("attention_transfer", "logit_kl")):
        make_stage(key, train=["q"], lr=1e-2).run(model, data, tmp_path / str(index), keep_source=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    kept = source_weights(model).kept(model.get_parameter(name))
    assert kept is not None and kept.dtype == torch.bfloat16 and torch.equal(kept, before[name])
    assert not torch.equal(model.get_parameter(name), before[name])


def test_weights_come_back_when_training_fails(converted: Callable[..., Any]) -> None:
    model = half(converted("lolcats"))
    before = snapshot(model)
    with pytest.raises(RuntimeError), float32_weights(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        raise RuntimeError
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


def test_steps_of_a_bfloat16_model_can_be_timed(converted: Callable[..., Any]) -> None:
    stages = [make_stage("attention_transfer"), make_stage("finetune", train=["mixer"], lora={"r": 2})]
    assert all(speed.student for speed in time_stages(half(converted("lolcats")), stages, length=16, repeats=1))
