"""Preference training against equation 7 written out in float64 with two separate models, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from trainable import dataset, make_stage, metrics, pairs, snapshot

from linearize.swap import teacher_path

LAYERS = "LSL"
IDS = torch.arange(2, 42)[None]
LORA = {"lora": {"r": 4}, "train": ["*.mixer.*"]}


def make_dpo(steps: int = 1, **settings: Any) -> Any:
    return make_stage("dpo", **{"tokens": steps * 4 * 64, "lr": 1e-3, **settings})


def perturbed(model: Any) -> Any:
    """The same model a few steps later, say."""
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=noise).to(p)
    return model


def log_likelihood(model: Any, ids: list[int], first: int) -> torch.Tensor:
    """log p of tokens `first` and later given those before them, one row alone, token by token."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return sum((logits[t - 1].log_softmax(-1)[ids[t]] for t in range(first, len(ids))), torch.zeros(()).double())


def written_out(
    policy: Any, reference: Any, batch: dict[str, torch.Tensor], loss: str, beta: float, smoothing: float
) -> tuple[torch.Tensor, float, float]:
    """Loss, accuracy and margin, summed over pairs."""
    total, right, margin = torch.zeros(()).double(), 0.0, 0.0
    for pair in range(len(batch["labels"]) // 2):
        ratios = []
        for row in (2 * pair, 2 * pair + 1):
            length = int(batch["attention_mask"][row].sum()) if "attention_mask" in batch else 32
            ids = batch["input_ids"][row, :length].tolist()
            first = int((batch["labels"][row] != -100).nonzero()[0])
            with torch.no_grad():
                expected = log_likelihood(reference, ids, first)
            ratios.append(log_likelihood(policy, ids, first) - expected)
        h = ratios[0] - ratios[1]
        if loss == "ipo":
            total = total + (h - 1 / (2 * beta)) ** 2
        else:
            wrong = (1 / (1 + torch.exp(beta * h))).log()
            total = total - (1 - smoothing) * (1 / (1 + torch.exp(-beta * h))).log() - smoothing * wrong
        right, margin = right + float(h > 0), margin + beta * float(h.detach())
    return total, right, margin


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.5, "label_smoothing": 0.2},
        {"loss": "ipo", "beta": 0.3},
        {"reference": "source"},
    ],
    ids=["sigmoid", "smoothed", "ipo", "source"],
)
def test_gradients_are_those_of_the_written_out_loss(
    converted: Callable[..., Any],
    pico_model: Callable[..., Any],
    pico_tokenizer: Any,
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    batch = pairs(tmp_path, pico_tokenizer).batch(range(3))
    assert batch["input_ids"].shape == (6, 32) and "attention_mask" in batch
    model = converted("gdn", LAYERS)
    stage = make_dpo(train=["*"], head_chunk=7, **settings)
    _, parameters = stage.begin(model)
    perturbed(model)
    policy = perturbed(converted("gdn", LAYERS)).double()
    reference = (pico_model() if "reference" in settings else converted("gdn", LAYERS)).double()
    loss, beta = settings.get("loss", "sigmoid"), settings.get("beta", 0.1)
    smoothing = settings.get("label_smoothing", 0)
    total, right, margin = written_out(policy, reference, batch, loss, beta, smoothing)
    assert stage.count(batch) == 3
    found = stage.backward(model, batch, 1 / 3)
    assert float(found["loss"]) == pytest.approx(float(total.detach()), rel=1e-4)
    assert float(found["accuracy"]) == right
    assert float(found["margin"]) == pytest.approx(margin, rel=1e-3, abs=1e-4)
    (total / 3).backward()
    atol = 2e-4 if loss == "ipo" else 2e-5  # its gradients are larger
    for name, p in policy.named_parameters():
        torch.testing.assert_close(parameters[name].grad.double(), p.grad, atol=atol, rtol=2e-3)


@pytest.mark.parametrize("what", [{"train": ["*"]}, LORA], ids=["full", "lora"])
def test_it_begins_at_the_reference_and_learns_the_preference(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, what: dict[str, Any]
) -> None:
    model = converted("gdn", LAYERS)
    before = snapshot(model)
    stage = make_dpo(30, lr=3e-3, **what)
    stage.run(model, pairs(tmp_path, pico_tokenizer), tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[0]["margin"] == 0
    assert lines[0]["accuracy"] == 0 and lines[-1]["accuracy"] == 1
    assert lines[-1]["loss"] < 0.3 and lines[-1]["margin"] > 1
    assert not stage.start._other, "the reference is given back"
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        trained = (
            "lora" not in what
            or ".mixer." in name
            or name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"))
        )
        assert torch.equal(tensor, before[name]) != trained, name


def test_only_what_trains_is_held_twice(converted: Callable[..., Any]) -> None:
    stage = make_dpo(**LORA)
    _, parameters = stage.begin(converted("gdn", LAYERS))
    assert set(stage.start._other) == set(parameters.values())
    stage = make_dpo(reference="source", **LORA)
    stage.begin(converted("gdn", LAYERS))
    assert stage.needs_teacher and not stage.start._other


def test_micro_batches_head_chunks_and_padding_change_nothing(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path
) -> None:
    results = []
    for micro, chunk, length in ((4, 2048, 32), (1, 5, 32), (2, 2048, 48)):
        model, data = converted("gdn", LAYERS), pairs(tmp_path, pico_tokenizer, seq_len=length)
        tokens = 3 * 4 * 2 * length
        stage = make_dpo(micro_batch_size=micro, head_chunk=chunk, train=["*"], tokens=tokens)
        stage.run(model, data, tmp_path / f"{micro}")
        results.append(metrics(tmp_path / f"{micro}"))
    assert len(results[0]) == 3
    for lines in results[1:]:
        for a, b in zip(results[0], lines, strict=True):
            for key in ("loss", "accuracy", "margin"):
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize("what", [{"train": ["*"]}, LORA], ids=["full", "lora"])
def test_a_killed_run_resumes_with_the_reference_of_its_beginning(
    converted: Callable[..., Any],
    pico_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: dict[str, Any],
) -> None:
    data, settings = pairs(tmp_path, pico_tokenizer), {"lr": 1e-2, "checkpoint_every": 2, **what}
    whole, again, restored = (converted("gdn", LAYERS) for _ in range(3))
    make_dpo(5, **settings).run(whole, data, tmp_path / "whole")
    stage, steps = make_dpo(5, **settings), []
    original = type(stage).backward

    def dying(self: Any, *args: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(type(stage), "backward", dying)
        stage.run(converted("gdn", LAYERS), data, tmp_path / "run")
    make_dpo(5, **settings).run(again, data, tmp_path / "run", resume=True)
    make_dpo(5, **settings).run(restored, data, tmp_path / "run", resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert torch.equal(restored.state_dict()[name], tensor), name


@pytest.mark.parametrize("keep", [False, True])
def test_the_source_stays_where_a_later_stage_needs_it(
    converted: Callable[..., Any], pico_model: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, keep: bool
) -> None:
    """After fine-tuning the start is not the source, and two snapshots change places in one model."""
    model = converted("gdn", LAYERS)
    tune = make_stage("finetune", steps=2, lr=1e-2, train=["*"])
    tune.run(model, dataset(tmp_path, pico_tokenizer), tmp_path / "tune", keep_source=True)
    reference = "source" if keep else "start"
    stage = make_dpo(3, train=["*"], reference=reference)
    stage.run(model, pairs(tmp_path, pico_tokenizer), tmp_path / "dpo", keep_source=True)
    assert (metrics(tmp_path / "dpo")[0]["margin"] == 0) != keep
    with torch.no_grad(), teacher_path(model):
        assert torch.equal(model(IDS).logits, pico_model()(IDS).logits)


def test_bf16_keeps_the_reference_apart(converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path) -> None:
    """Autocast remembers casts of weights, which policy and reference share."""
    batch = pairs(tmp_path, pico_tokenizer).batch(range(4))
    found = []
    for enabled in (False, True):
        model = converted("gdn", LAYERS)
        stage = make_dpo(train=["*"])
        stage.begin(model)
        perturbed(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(float(stage.backward(model, batch, 1.0)["margin"]))
    assert abs(found[0]) > 0.05 and found[1] == pytest.approx(found[0], rel=0.3)


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(ValidationError, match="label_smoothing belongs to loss: sigmoid, and loss is ipo"):
        make_dpo(loss="ipo", label_smoothing=0.1)
