"""Alignment of hidden states against plain hooks and one backward, for every decoder, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from pydantic import ValidationError
from stage_cases import KINDS, batch_of, trainable
from trainable import dataset, make_stage, metrics, snapshot

from linearize.errors import UserError
from linearize.registry import find
from linearize.stages.base import Stage
from linearize.swap import swapped, teacher_path

LAYERS = "LSL"
IDS = torch.arange(2, 42)[None]
WHERE = ("block", "stream", "final")


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """What each layer of a Llama was given and returned, and the states after the last norm."""
    seen: list[dict[str, Any]] = []

    def hook(m: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append({"args": args, "kwargs": kwargs, "output": output})

    hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
    last = model.model(**inputs, use_cache=False).last_hidden_state
    for handle in hooks:
        handle.remove()
    return seen, last


def distance(a: torch.Tensor, b: torch.Tensor, kind: str) -> torch.Tensor:
    """Of each of the N real tokens, [N]."""
    if kind == "cosine":
        return 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    squared = (a - b).square().mean(-1)
    return squared if kind == "mse" else squared.sqrt()


def reference(model: Any, source: Any, batch: dict[str, torch.Tensor], where: str, kind: str) -> list[torch.Tensor]:
    """Summed loss of everything compared; gradients of `block` are those of the sum, of the others of the mean."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    keep = batch.get("attention_mask", torch.ones(4, 32)).bool()
    with torch.no_grad():
        teacher, last = outputs(source, inputs)
    student, end = outputs(model, inputs)
    if where == "final":
        pairs = [(end, last)]
    elif where == "stream":
        pairs = [(s["output"], t["output"]) for s, t in zip(student, teacher, strict=True)]
    else:
        pairs = []
        for layer, s, t in zip(model.model.layers, student, teacher, strict=True):
            if any(".mixer." in name for name, _ in layer.named_parameters()):
                pairs.append((layer(*t["args"], **s["kwargs"]), t["output"]))
    return [distance(a[keep], b[keep], kind).sum() for a, b in pairs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["mse", "l2", "cosine"])
@pytest.mark.parametrize("where", WHERE)
def test_gradients_are_those_of_plain_hooks_and_one_backward(
    converted: Callable[..., Any],
    pico_model: Callable[..., Any],
    pico_tokenizer: Any,
    tmp_path: Path,
    where: str,
    loss: str,
    kind: str,
) -> None:
    batch = batch_of(kind, tmp_path, pico_tokenizer)
    model, twin, source = converted("gdn", LAYERS), converted("gdn", LAYERS).double(), pico_model().double()
    stage = make_stage("hidden_align", where=where, loss=loss)
    parameters = trainable(stage, model)
    assert set(parameters) == {name for name, _ in model.named_parameters() if ".mixer." in name}
    parts = reference(twin, source, batch, where, loss)
    items = stage.count(batch)
    assert items == (int(batch["attention_mask"].sum()) if kind == "padded" else 4 * 32)
    found = stage.backward(model, batch, 1 / items)
    mean = sum(float(part.detach()) for part in parts) / len(parts)
    assert float(found["loss"]) == pytest.approx(mean, rel=1e-4)
    total = torch.stack(parts).sum() if where == "block" else torch.stack(parts).mean()
    (total / items).backward()
    for name, p in twin.named_parameters():
        if name in parameters:
            assert p.grad.abs().max() > 1e-5, name
            torch.testing.assert_close(parameters[name].grad.double(), p.grad, atol=1e-5, rtol=2e-3)
        else:
            assert model.get_parameter(name).grad is None, name


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("where", WHERE)
def test_accumulation_changes_nothing(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, where: str, packing: bool
) -> None:
    data, results = dataset(tmp_path, pico_tokenizer, packing=packing), []
    for micro in (4, 1):
        stage = make_stage("hidden_align", where=where, steps=3, micro_batch_size=micro)
        stage.run(converted("gdn", LAYERS), data, tmp_path / str(micro))
        results.append(metrics(tmp_path / str(micro)))
    for a, b in zip(*results, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["patterns", "lora"])
def test_it_learns_changes_what_it_trains_and_the_teacher_stays_the_source(
    converted: Callable[..., Any],
    pico_model: Callable[..., Any],
    pico_tokenizer: Any,
    tmp_path: Path,
    where: str,
    lora: Any,
) -> None:
    model = converted("gdn", LAYERS)
    before = snapshot(model)
    settings = {"train": ["*.mixer.*", "model.layers.0.mlp.*"], "lora": lora, "where": where}
    stage = make_stage("hidden_align", steps=40, lr=1e-2, **settings)
    stage.run(model, dataset(tmp_path, pico_tokenizer), tmp_path / "run")
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) < sum(losses[:5]) / 1.3
    for name, tensor in model.state_dict().items():
        trained = ".mixer." in name or ".layers.0.mlp." in name or (lora and ".self_attn." in name)
        if not trained:
            assert torch.equal(tensor, before[name]), name
    for part in (".mixer.", ".layers.0.mlp.", *([".q_proj."] if lora else [])):
        assert any(part in n and not torch.equal(t, before[n]) for n, t in model.state_dict().items()), part
    with torch.no_grad(), teacher_path(model):
        assert torch.equal(model(IDS).logits, pico_model()(IDS).logits)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("key", pico.KEYS)
def test_every_decoder_takes_a_step(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, key: str, where: str
) -> None:
    """Language towers of vision models among them."""
    model = converted("gdn", LAYERS, family=key)
    cls = find("stages", "hidden_align", Stage)
    settings = {"batch_size": 4, "tokens": 128, "lr": 1e-2, "where": where}
    stage = cls(cls.Config.model_validate(settings), next(iter(swapped(model).values())).family)
    before = snapshot(model)
    stage.run(model, dataset(tmp_path, pico_tokenizer), tmp_path / "run")
    for name, tensor in model.state_dict().items():
        assert ".mixer." in name or torch.equal(tensor, before[name]), name
    for name in swapped(model):
        assert any(n.startswith(name) and not torch.equal(t, before[n]) for n, t in model.state_dict().items()), name


@pytest.mark.parametrize(
    ("where", "pattern", "message"),
    [
        ("block", "model.norm.weight", "where: block depends on parameters under model.layers.\\* alone"),
        ("block", "*embed_tokens*", "where: block depends on parameters under model.layers.\\* alone"),
        ("stream", "lm_head.*", "where: stream depends on parameters under model.\\* alone, and pattern 'lm_head"),
        ("final", "lm_head.*", "where: final depends on parameters under model.\\* alone, and pattern 'lm_head"),
        ("final", "*.mixr.*", "train pattern '\\*.mixr.\\*' matches nothing that trains"),
    ],
)
def test_what_the_states_do_not_depend_on_is_refused(
    converted: Callable[..., Any], where: str, pattern: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_stage("hidden_align", where=where, train=["*.mixer.*", pattern]).check(converted("gdn", LAYERS))


def test_a_lora_target_that_the_states_do_not_depend_on_is_refused(converted: Callable[..., Any]) -> None:
    stage = make_stage("hidden_align", lora={"targets": ["q", "lm_head"]})
    with pytest.raises(UserError, match="does not depend on lora target 'lm_head'; leave it out"):
        stage.check(converted("gdn", LAYERS))


@pytest.mark.parametrize("where", WHERE)
def test_everything_is_everything_that_is_compared(converted: Callable[..., Any], where: str) -> None:
    model = converted("gdn", LAYERS)
    found = set(trainable(make_stage("hidden_align", where=where, train=["*"]), model))
    start = "model.layers." if where == "block" else "model."
    assert found == {name for name, _ in model.named_parameters() if name.startswith(start)}


def test_requests_without_effect_are_refused(converted: Callable[..., Any]) -> None:
    with pytest.raises(ValidationError, match="where: block never holds .*leave it out"):
        make_stage("hidden_align", gradient_checkpointing=True)
    make_stage("hidden_align", gradient_checkpointing=True, where="stream").check(converted("gdn", LAYERS))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("key", pico.ENCODERS)
def test_encoders_are_refused(where: str, key: str) -> None:
    cls = find("stages", "hidden_align", Stage)
    stage = cls(cls.Config.model_validate({"tokens": 128, "where": where}), pico.find_family(key))
    with pytest.raises(UserError, match="hidden_align is for models that predict the next token.*attention_transfer"):
        stage.check(pico.pico_model(key))


@pytest.mark.parametrize("where", WHERE)
def test_the_student_drops_out_and_the_teacher_does_not(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, where: str
) -> None:
    model = converted("lolcats", LAYERS)
    data = dataset(tmp_path, pico_tokenizer)
    modes: dict[bool, set[bool]] = {True: set(), False: set()}

    def see(module: Any, args: Any) -> None:
        modes[module.self_attn.teacher].add(module.training)
        assert all(m.training == module.training for m in module.modules())

    model.model.layers[0].mlp.register_forward_pre_hook(lambda m, args: see(model.model.layers[0], args))
    make_stage("hidden_align", where=where, train=["mixer"], lora={"r": 2, "dropout": 0.5}).run(
        model, data, tmp_path / "run"
    )
    assert modes == {True: {False}, False: {True}}
    assert not any(m.training for m in model.modules())
