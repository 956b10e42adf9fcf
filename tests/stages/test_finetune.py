"""Fine-tuning through LoRA and DoRA, in full and by patterns: what changes, what stays, and what is exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from trainable import dataset, make_stage, metrics, snapshot

import linearize
from linearize.errors import UserError
from linearize.hf.export import export_adapter

LAYERS = "LSL"
IDS = torch.arange(2, 42)[None]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapter_trains_alone_and_merges_to_the_same_logits(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, dora: bool
) -> None:
    data = dataset(tmp_path, pico_tokenizer)
    lora = {"r": 4, "alpha": 8, "dora": dora}
    model, merged = converted("lolcats", LAYERS), converted("lolcats", LAYERS)
    before = snapshot(model)
    apart = make_stage("finetune", steps=5, lr=1e-2, lora={**lora, "merge": False})
    apart.run(model, data, tmp_path / "apart")
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer.", ".")]), name
    make_stage("finetune", steps=5, lr=1e-2, lora=lora).run(merged, data, tmp_path / "merged")
    after = merged.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        is_target = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"))
        assert torch.equal(tensor, after[name]) != is_target, name
    with torch.no_grad():
        expected, found = model(IDS).logits, merged(IDS).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert (expected - converted("lolcats", LAYERS)(IDS).logits).abs().max() > 0.1
    assert not merged.training and not any(p.requires_grad for p in merged.parameters())


def test_an_unmerged_adapter_is_exported_beside_the_weights(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path
) -> None:
    data, settings = dataset(tmp_path, pico_tokenizer), {"steps": 5, "lr": 1e-2, "lora": {"r": 4, "merge": False}}
    model = converted("lolcats", LAYERS)
    before = snapshot(model)
    stage = make_stage("finetune", train=["*.mixer.*"], **settings)
    stage.run(model, data, tmp_path / "run")
    with torch.no_grad():
        expected = model(IDS).logits
    again = converted("lolcats", LAYERS)
    resumed = make_stage("finetune", train=["*.mixer.*"], **settings)
    resumed.run(again, data, tmp_path / "run", resume=True)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected)
    out = export_adapter(resumed.adapter, pico_tokenizer, tmp_path / "out")
    base = type(again).from_pretrained(out)
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name]) != (".mixer." in name), name
    loaded, _ = linearize.load(out)
    assert isinstance(loaded, PeftModel)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, out / "adapter").eval()(IDS).logits, expected)
        assert torch.equal(loaded(IDS).logits, expected)


@pytest.mark.parametrize(
    "train", [["*"], ["*.mixer.*", "model.norm.weight"], ["model.layers.1.mlp.*"]], ids=["full", "two", "mlp"]
)
def test_patterns_train_what_they_match_and_nothing_else(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, train: list[str]
) -> None:
    model = converted("lolcats", LAYERS)
    before = snapshot(model)
    make_stage("finetune", steps=2, lr=1e-3, train=train).run(model, dataset(tmp_path, pico_tokenizer), tmp_path / "r")
    matches = {
        "*": lambda name: True,
        "*.mixer.*": lambda name: ".mixer." in name,
        "model.norm.weight": lambda name: name == "model.norm.weight",
        "model.layers.1.mlp.*": lambda name: name.startswith("model.layers.1.mlp."),
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != any(matches[pattern](name) for pattern in train), name


def test_lora_and_patterns_train_together_and_a_finished_run_is_restored(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path
) -> None:
    data, settings = dataset(tmp_path, pico_tokenizer), {"steps": 3, "lora": {"r": 2}, "train": ["*.mixer.*"]}
    model, again = converted("lolcats", LAYERS), converted("lolcats", LAYERS)
    seconds = make_stage("finetune", **settings).run(model, data, tmp_path / "run")
    assert make_stage("finetune", **settings).run(again, data, tmp_path / "run", resume=True) == seconds
    for name, tensor in converted("lolcats", LAYERS).state_dict().items():
        assert torch.equal(again.state_dict()[name], model.state_dict()[name])
        is_trained = ".mixer." in name or name.endswith(
            ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
        )
        assert torch.equal(model.state_dict()[name], tensor) != is_trained, name


def test_mixers_have_their_own_learning_rate(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path
) -> None:
    """Adam's first step moves a weight by lr times the sign of its gradient, so the distances show the rates."""
    model = converted("lolcats", LAYERS)
    before = snapshot(model)
    stage = make_stage("finetune", lr=1e-3, lrs={"*.mixer.*": 2e-2}, train=["*"], warmup=0.0)
    stage.run(model, dataset(tmp_path, pico_tokenizer), tmp_path / "run")
    for name, tensor in model.state_dict().items():
        distance = float((tensor - before[name]).abs().max())
        assert distance == pytest.approx(2e-2 if ".mixer." in name else 1e-3, rel=1e-2), name


def test_labels_that_are_not_asked_for_do_not_count(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path
) -> None:
    batch = dataset(tmp_path, pico_tokenizer).batch(range(4))
    batch["labels"][0] = -100
    batch["labels"][1, 5:] = -100
    model = converted("lolcats", LAYERS)
    stage = make_stage("finetune", train=["*"])
    parameters = stage.prepare(model)
    asked = batch["labels"][:, 1:] != -100
    assert stage.count(batch) == int(asked.sum()) < 3 * 31
    found = stage.backward(model, batch, 1 / stage.count(batch))
    gradients = {name: p.grad.clone() for name, p in parameters.items()}
    model.zero_grad()
    mean = model(**batch, use_cache=False).loss
    mean.backward()
    assert float(found["loss"]) / stage.count(batch) == pytest.approx(float(mean.detach()), rel=1e-6)
    for name, p in parameters.items():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-6, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(tmp_path, pico_tokenizer)
    calls = []
    original = torch.utils.checkpoint.checkpoint

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return original(*args, **options)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    results = []
    for recompute in (False, True):
        model = converted("lolcats", LAYERS)
        settings = {"lora": {"r": 2, "dropout": 0.1}, "train": ["*.mixer.*"], "gradient_checkpointing": recompute}
        make_stage("finetune", steps=3, lr=1e-2, **settings).run(model, data, tmp_path / str(recompute))
        results.append(model.state_dict())
        assert len(calls) == (3 * len(LAYERS) if recompute else 0)
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, atol=1e-6, rtol=1e-5)


def test_the_loss_falls(converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path) -> None:
    model = converted("lolcats", LAYERS)
    stage = make_stage("finetune", steps=40, lr=1e-2, train=["*"])
    stage.run(model, dataset(tmp_path, pico_tokenizer), tmp_path / "run")
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) < sum(losses[:5]) / 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "trains nothing; set lora: {r: 8}, or train: \\[all\\]"),
        ({"train": ["*.mixr.*"]}, "train pattern '\\*.mixr.\\*' matches nothing that trains; names look like model"),
        ({"lora": {"targets": ["q", "qproj"]}}, "unknown lora target 'qproj'; did you mean 'q_proj'\\?"),
    ],
)
def test_errors(converted: Callable[..., Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_stage("finetune", **settings).check(converted("lolcats", LAYERS))
