"""Distillation of logits against a float64 reference, and what it leaves alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainable import dataset, make_stage, metrics, snapshot

from linearize.data import DataConfig, PackedDataset, model_inputs
from linearize.errors import UserError
from linearize.losses import coarse, divergence
from linearize.swap import source_weights, swapped, teacher_path

LAYERS = "LSL"
IDS = torch.arange(2, 42)[None]


def reference(
    student: torch.Tensor, teacher: torch.Tensor, kind: str, tau: float, top_k: int | None, of_teacher: float
) -> float:
    """The divergence of two rows of logits, outcome by outcome in float64."""
    p, q = ((x.double() / tau).softmax(-1).tolist() for x in (teacher.double() / of_teacher, student))
    if top_k is not None:
        best = sorted(range(len(p)), key=lambda i: -p[i])[:top_k]
        p, q = ([*(x[i] for i in best), 1 - sum(x[i] for i in best)] for x in (p, q))
    p, q = torch.tensor(p).double(), torch.tensor(q).double()
    if kind == "reverse":
        p, q = q, p
    if kind == "jensen_shannon":
        m = (p + q) / 2
        total = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    else:
        total = (p * (p / q).log()).sum()
    return float(total) * tau**2


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon"])
@pytest.mark.parametrize(("tau", "top_k"), [(1.0, None), (2.5, None), (1.0, 5), (0.5, 3), (1.0, 500)])
@pytest.mark.parametrize("of_teacher", [1.0, 1.25])
def test_divergences_are_what_they_are_in_float64(kind: str, tau: float, top_k: int | None, of_teacher: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 31, generator=generator) for _ in range(2))
    k = top_k if top_k is not None and top_k < 31 else None
    expected = sum(reference(s, t, kind, tau, k, of_teacher) for s, t in zip(student, teacher, strict=True))
    assert float(divergence(student, teacher, kind, tau, top_k, of_teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(teacher / of_teacher, teacher, kind, tau, top_k, of_teacher)) == pytest.approx(0, abs=1e-5)


def test_all_other_outcomes_are_one() -> None:
    log_p = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.7, 0.1, 0.1]]).log()
    found = coarse(log_p, torch.tensor([[0, 2], [1, 3]])).exp()
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.15, 0.35], [0.7, 0.1, 0.2]]))


def ready(model: Any, **settings: Any) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    stage = make_stage("logit_kl", train=["*"], **settings)
    _, parameters = stage.begin(model)
    return stage, parameters


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 2.0, "ce": 0.25},
        {"top_k": 6},
        {"temperature": 2.0, "ce": 0.75, "ce_on": "answers"},
        {"teacher_temperature": 1.25, "temperature": 2.0, "ce": 0.75, "ce_on": "answers"},
    ],
    ids=["kl", "ce", "top", "answers", "calibrated"],
)
def test_gradients_are_those_of_the_written_out_loss(
    converted: Callable[..., Any],
    pico_model: Callable[..., Any],
    pico_tokenizer: Any,
    tmp_path: Path,
    packing: bool,
    settings: dict[str, Any],
) -> None:
    """Mean over the predicted tokens of all rows, in float64, with a source model of its own as the teacher."""
    batch = with_answers(dataset(tmp_path, pico_tokenizer, packing=packing).batch(range(4)))
    model, twin = converted("lolcats", LAYERS), converted("lolcats", LAYERS).double()
    stage, parameters = ready(model, head_chunk=17, **settings)
    inputs = model_inputs(batch)
    with torch.no_grad():
        teacher = pico_model().double()(**inputs, use_cache=False).logits
    logits = twin(**inputs, use_cache=False).logits
    tau = settings.get("temperature", 1.0)
    teacher = teacher / settings.get("teacher_temperature", 1.0)
    total, count = torch.zeros(()).double(), 0
    for row, t in itertools.product(range(4), range(31)):
        label = int(batch["labels"][row, t + 1])
        if label == -100:
            continue
        p, q = (teacher[row, t] / tau).softmax(-1), (logits[row, t] / tau).softmax(-1)
        if "top_k" in settings:
            best = p.topk(settings["top_k"]).indices
            p, q = (torch.cat([x[best], 1 - x[best].sum(0, keepdim=True)]) for x in (p, q))
        kl = tau**2 * (p * (p / q).log()).sum()
        counts = settings.get("ce_on") != "answers" or bool(batch["answers"][row, t + 1])
        weight = settings.get("ce", 0.0) if counts else 0.0
        total = total + (1 - weight) * kl - weight * logits[row, t].log_softmax(-1)[label]
        count += 1
    assert stage.count(batch) == count < 4 * 31
    found = stage.backward(model, batch, 1 / count)
    assert float(found["loss"]) == pytest.approx(float(total.detach()), rel=1e-4)
    (total / count).backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(parameters[name].grad.double(), p.grad, atol=2e-5, rtol=2e-3)


def with_answers(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As if some tokens were of answers in a recall document."""
    return {**batch, "answers": batch["input_ids"] % 3 == 0}


@pytest.mark.parametrize("teacher", ["live", "cached"])
def test_cross_entropy_on_answers_alone(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, teacher: str
) -> None:
    batch = dataset(tmp_path, pico_tokenizer).batch(range(4))
    cached = {"teacher": "cached", "top_k": 6} if teacher == "cached" else {}

    def backward(batch: dict[str, torch.Tensor], **settings: Any) -> dict[str, float]:
        model = converted("lolcats", LAYERS)
        stage, _ = ready(model, **cached, **settings)
        found = stage.backward(model, stage.completed(model, batch), 1.0)
        return {key: pytest.approx(float(value), rel=1e-5) for key, value in found.items()}

    plain, all_tokens = backward(batch), backward(batch, ce=0.5)
    some = backward(with_answers(batch), ce=0.5, ce_on="answers")
    assert backward(batch, ce=0.5, ce_on="answers") == {**plain, "ce": 0}, "rows of text"
    everywhere = {**batch, "answers": torch.ones_like(batch["input_ids"], dtype=torch.bool)}
    assert backward(everywhere, ce=0.5, ce_on="answers") == all_tokens
    assert some["kl"] == plain["kl"].expected and 0 < some["ce"].expected < all_tokens["ce"].expected


def test_answers_need_a_weight_and_recall_documents(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ce_on: answers says where the cross-entropy counts, and ce is 0"):
        make_stage("logit_kl", train=["*"], ce_on="answers")
    stage, text = make_stage("logit_kl", train=["*"], ce=0.5, ce_on="answers"), DataConfig(source="text")
    with pytest.raises(UserError, match=r"finds no recall documents, because its data.recall_fraction is 0"):
        stage.check_data(text, text)
    stage.check_data(text.model_copy(update={"recall_fraction": 0.5}), text)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("settings", [{}, {"ce": 0.5, "ce_on": "answers"}], ids=["kl", "answers"])
def test_micro_batches_head_chunks_and_padding_change_nothing(
    converted: Callable[..., Any],
    pico_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packing: bool,
    settings: dict[str, Any],
) -> None:
    plain = PackedDataset.batch
    monkeypatch.setattr(PackedDataset, "batch", lambda data, rows: with_answers(plain(data, rows)))
    data, results = dataset(tmp_path, pico_tokenizer, packing=packing), []
    for micro, chunk in ((4, 2048), (1, 5)):
        model = converted("gdn", LAYERS)
        sizes = {"micro_batch_size": micro, "head_chunk": chunk}
        stage = make_stage("logit_kl", steps=3, train=["*"], lr=1e-3, **sizes, **settings)
        stage.run(model, data, tmp_path / str(micro))
        results.append(metrics(tmp_path / str(micro)))
    for a, b in zip(*results, strict=True):
        for key in ("loss", "kl", "ce"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", [{"train": ["*"]}, {"lora": {"r": 4}, "train": ["*.mixer.*"]}], ids=["full", "lora"])
def test_the_student_learns_and_the_teacher_stays_the_source(
    converted: Callable[..., Any],
    pico_model: Callable[..., Any],
    pico_tokenizer: Any,
    tmp_path: Path,
    precision: str,
    what: dict[str, Any],
    tied: bool,
) -> None:
    """bf16: autocast remembers casts of weights, and must not confuse the student's with the teacher's."""
    model = converted("gdn", LAYERS, tie_word_embeddings=tied)
    source = pico_model(tie_word_embeddings=tied)
    stage = make_stage("logit_kl", steps=60, lr=5e-3, precision=precision, **what)
    stage.run(model, dataset(tmp_path, pico_tokenizer), tmp_path / "run")
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) < sum(losses[:5]) / (2.5 if "lora" not in what else 1.3)
    with torch.no_grad():
        expected = source(IDS).logits
        with teacher_path(model):
            assert torch.equal(model(IDS).logits, expected)
        assert not torch.equal(model(IDS).logits, expected)


def test_a_divided_teacher_is_learned_as_it_is_then(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path
) -> None:
    """Nearer to the distribution of the divided logits than to that of the logits, and less sure."""
    data = dataset(tmp_path, pico_tokenizer)
    batch, found = data.batch(range(4)), {}
    for temperature in (1.0, 3.0):
        model = converted("gdn", LAYERS)
        for attn in swapped(model).values():
            attn.o_proj.weight.data *= 0.1  # so that the mixers can do what softmax did
        model.lm_head.weight.data *= 8
        stage = make_stage("logit_kl", steps=80, lr=1e-2, train=["all"], teacher_temperature=temperature)
        stage.run(model, data, tmp_path / str(temperature))
        with torch.no_grad():
            student = model(**model_inputs(batch)).logits
            with teacher_path(model):
                teacher = model(**model_inputs(batch)).logits
        distances = {t: float(divergence(student, teacher, "forward", 1.0, None, t)) for t in (1.0, 3.0)}
        assert min(distances, key=distances.__getitem__) == temperature
        found[temperature] = student.softmax(-1).amax(-1).mean()
    assert found[3.0] < found[1.0]


@pytest.mark.parametrize(("kind", "models"), [("logit_kl", 2), ("finetune", 1)])
def test_a_piece_goes_through_the_head_once(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, kind: str, models: int
) -> None:
    """The teacher's and the student's, and never more than `head_chunk` predictions."""
    model, seen = converted("gdn", LAYERS), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    stage = make_stage(kind, train=["*"], head_chunk=17)
    stage.begin(model)
    batch = dataset(tmp_path, pico_tokenizer).batch(range(4))
    stage.backward(model, batch, 1.0)
    assert sum(seen) == models * stage.count(batch) and max(seen) == 17


@pytest.mark.parametrize("kind", ["logit_kl", "finetune"])
@pytest.mark.parametrize("train", [["*.mixer.*"], ["lm_head.weight"]])
def test_rows_without_a_prediction_have_no_gradient(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, kind: str, train: list[str]
) -> None:
    batch = dataset(tmp_path, pico_tokenizer).batch(range(4))
    model, stage = converted("gdn", LAYERS), make_stage(kind, train=train)
    _, parameters = stage.begin(model)
    found = stage.backward(model, {**batch, "labels": torch.full_like(batch["labels"], -100)}, 1.0)
    assert not any(float(value) for value in found.values())
    assert not any(p.grad is not None and p.grad.any() for p in parameters.values())
    stage.backward(model, batch, 1.0)
    assert all(p.grad is not None for p in parameters.values())


def test_frozen_parameters_do_not_change_and_a_finished_run_is_restored(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path
) -> None:
    data, model = dataset(tmp_path, pico_tokenizer), converted("gdn", LAYERS)
    before = snapshot(model)
    settings = {"steps": 3, "lr": 1e-2, "train": ["*.mixer.*", "model.layers.1.mlp.*"]}
    make_stage("logit_kl", **settings).run(model, data, tmp_path / "run")
    for name, tensor in model.state_dict().items():
        trained = ".mixer." in name or name.startswith("model.layers.1.mlp.")
        assert torch.equal(tensor, before[name]) != trained, name
    again = converted("gdn", LAYERS)
    make_stage("logit_kl", **settings).run(again, data, tmp_path / "run", resume=True)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    with teacher_path(again), teacher_path(model), torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits), "a restored run keeps the source too"


def test_what_no_stage_needs_is_not_held_twice(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path
) -> None:
    data = dataset(tmp_path, pico_tokenizer)
    for keep in (False, True):
        model = converted("gdn", LAYERS)
        make_stage("finetune", train=["*"]).run(model, data, tmp_path / str(keep), keep_source=keep)
        held = len(source_weights(model)._other)
        assert held == (sum(".mixer." not in name for name, _ in model.named_parameters()) if keep else 0)


def test_autocast_does_not_take_the_teachers_weights_for_the_students(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path
) -> None:
    """It remembers the casts of weights as long as it lasts, and teacher and student share their parameters."""
    batch = dataset(tmp_path, pico_tokenizer).batch(range(4))
    found = []
    for precision in (torch.float32, torch.bfloat16):
        model = converted("gdn", LAYERS)
        stage, parameters = ready(model)
        for name, p in parameters.items():
            if "mlp" in name or "lm_head" in name:
                p.data *= 3.0
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            found.append(float(stage.backward(model, batch, 1.0)["kl"]))
    assert found[1] == pytest.approx(found[0], rel=0.05)
