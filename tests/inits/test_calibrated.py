"""The calibrated init: what it measures on the teacher, the least squares it solves, and that nothing else changes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainable import make_recipe

from linearize.hf.auto import linearized
from linearize.inits.calibrated import attention_statistics, calibrate, match_outputs, watch
from linearize.pipeline import convert
from linearize.swap import swapped

METHODS = ["gdn", "gla", "kda", "mamba2"]


@pytest.fixture
def student(pico_model: Callable[..., Any]) -> Callable[..., Any]:
    """Factory (mixer's type and settings) -> pico model with that mixer in two layers, at its declared first values."""

    def make(type: str, **settings: Any) -> Any:
        model = pico_model(num_hidden_layers=3)
        linearized(model, {"mixers": [{"type": type, **settings}], "layers": [0, None, 0]})
        for name, attn in swapped(model).items():
            attn.mixer.initialise(f"{name}.mixer", seed=0)
        return model.eval()

    return make


def ids(rows: int = 3, tokens: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int], tokens: int, left: bool) -> dict[str, torch.Tensor]:
    """Rows of these lengths, padded on one side with tokens of which nothing may be seen."""
    place = torch.arange(tokens)[None]
    size = torch.tensor(lengths)[:, None]
    mask = (place >= tokens - size if left else place < size).long()
    given = ids(len(lengths), tokens)
    return {"input_ids": given, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def packed(lengths: list[int]) -> dict[str, torch.Tensor]:
    """One row of documents of these lengths."""
    return {"input_ids": ids(1, sum(lengths)), "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


def seen(model: Any, batch: dict[str, torch.Tensor]) -> list[tuple[Any, torch.Tensor, dict[str, Any], torch.Tensor]]:
    """(attention, input, kwargs, teacher's heads) of each swapped layer."""
    found: list[Any] = []
    with torch.no_grad():
        watch(model, [batch], lambda name, attn, call, heads, output: found.append((attn, call, heads)))
    return found


def attention_by_hand(attn: Any, x: torch.Tensor, theta: float) -> list[list[torch.Tensor]]:
    """Softmax weights of each head's queries over the keys up to theirs, for one document x [T, C] in float64."""
    size, heads = attn.head_dim, attn.config.num_attention_heads
    q, k = (p.weight.double() @ x.double().T for p in (attn.q_proj, attn.k_proj))  # [H * D, T]
    half, found = size // 2, []
    for h in range(heads):
        turned = []
        for vectors, head in ((q, h), (k, h // (heads // attn.config.num_key_value_heads))):
            vector, out = vectors[head * size : (head + 1) * size], torch.zeros(len(x), size).double()
            for t in range(len(x)):
                for i in range(half):
                    angle = t * theta ** (-2 * i / size)
                    a, b = vector[i, t], vector[i + half, t]
                    out[t, i] = a * math.cos(angle) - b * math.sin(angle)
                    out[t, i + half] = b * math.cos(angle) + a * math.sin(angle)
            turned.append(out)
        found.append([(turned[1][: t + 1] @ turned[0][t] / math.sqrt(size)).softmax(0) for t in range(len(x))])
    return found


def statistics_by_hand(attn: Any, documents: list[torch.Tensor], theta: float, window: int) -> list[torch.Tensor]:
    """Weight times distance and weight of what lies beyond the window, and entropy: sums over all tokens, [Hq]."""
    reach, mass, entropy = torch.zeros(3, attn.config.num_attention_heads, dtype=torch.float64)
    for document in documents:
        for h, rows in enumerate(attention_by_hand(attn, document, theta)):
            for t, weights in enumerate(rows):
                for i, w in enumerate(weights):
                    if t - i >= window:
                        reach[h] += float(w) * (t - i)
                        mass[h] += float(w)
                if t > 0:
                    entropy[h] -= sum(float(w) * math.log(float(w)) for w in weights) / math.log(t + 1)
    return [reach, mass, entropy]


BATCHES: dict[str, tuple[dict[str, torch.Tensor], list[tuple[int, slice]]]] = {
    "plain": ({"input_ids": ids(2, 23)}, [(0, slice(0, 23)), (1, slice(0, 23))]),
    "packed": (packed([5, 1, 17]), [(0, slice(0, 5)), (0, slice(5, 6)), (0, slice(6, 23))]),
    "right padded": (padded([23, 9], 23, left=False), [(0, slice(0, 23)), (1, slice(0, 9))]),
    "left padded": (padded([23, 9], 23, left=True), [(0, slice(0, 23)), (1, slice(14, 23))]),
}
"""A batch, and where its documents lie: row and columns."""


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("window", [0, 4])
def test_statistics_of_attention_by_hand(student: Any, kind: str, window: int) -> None:
    model, (batch, places) = student("composed", decay="scalar", window=window), BATCHES[kind]
    for attn, call, _ in seen(model, batch):
        with torch.no_grad():
            found = attention_statistics(attn, call)
            documents = [call.x[row, columns] for row, columns in places]
            expected = statistics_by_hand(attn, documents, model.config.rope_parameters["rope_theta"], window)
        for result, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(result.double(), truth, atol=1e-4, rtol=1e-5)
        assert all((sums > 1).all() for sums in found) and (found[1] < sum(map(len, documents)) + 1e-3).all()


def test_statistics_of_long_rows_are_taken_in_blocks(student: Any) -> None:
    model = student("gla")
    for attn, call, _ in seen(model, {"input_ids": ids(1, 300)}):
        with torch.no_grad():
            found = attention_statistics(attn, call)
            q, k, _ = attn.family.project(attn, call.x)
            q, k = attn.family.rotate(attn, *attn.family.normed(attn, q, k), call.position)
            scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, dim=2)) * attn.head_dim**-0.5
            age = torch.arange(300)[:, None] - torch.arange(300)[None]
            weights = scores.masked_fill(age < 0, float("-inf")).softmax(-1)
        entropy = torch.special.entr(weights).sum(-1)[..., 1:] / torch.arange(2, 301).log()
        torch.testing.assert_close(found[0], (weights * age).sum((0, 2, 3)), atol=0.3, rtol=1e-5)
        torch.testing.assert_close(found[1], torch.full((len(found[1]),), 300.0), atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(found[2], entropy.sum((0, 2)), atol=3e-3, rtol=1e-5)


def test_heads_that_never_see_past_their_window_remember_it(student: Any) -> None:
    model = student("composed", decay="scalar", window=16)
    for found in calibrate(model, [{"input_ids": ids(2, 12)}]).values():
        assert (found.distance == 16).all()


def test_batches_count_by_their_tokens(student: Any) -> None:
    rows = ids(3, 24)
    long = {"input_ids": rows[:1]}
    short = {"input_ids": rows[1:], "attention_mask": (torch.arange(24) < 4).long().expand(2, -1)}
    both, models = [], [student("gdn") for _ in range(3)]
    for model, batches in zip(models, ([long], [short], [long, short]), strict=True):
        both.append(calibrate(model, batches))
    for name in both[2]:
        for field in ("distance", "entropy"):
            one, two, result = (getattr(x[name], field) for x in (both[0], both[1], both[2]))
            torch.testing.assert_close(result, (24 * one + 8 * two) / 32)


SCALED: list[dict[str, Any]] = [
    {"type": "gdn"},
    {"type": "composed", "output": {"scale": True}, "decay": "scalar", "window": 6},
    {"type": "composed", "output": {"scale": True, "norm": "rms"}, "window": 6, "combine": "sigmoid"},
]


@pytest.mark.parametrize("settings", SCALED, ids=str)
@pytest.mark.parametrize("kind", BATCHES)
def test_the_factor_per_head_is_the_least_squares_solution(student: Any, settings: dict, kind: str) -> None:
    model, (batch, places) = student(**settings), BATCHES[kind]
    batches = [batch, {"input_ids": ids(1, 12, seed=5)}]
    match_outputs(model, batches)
    layers = [layer for b in batches for layer in seen(model, b)]
    for attn in swapped(model).values():
        found, columns, targets = attn.mixer.output_scale.detach().clone(), [], []
        for other, call, heads in layers:
            if other is not attn:
                continue
            outputs = []
            for value in (0.0, 1.0):
                attn.mixer.output_scale.data.fill_(value)
                with torch.no_grad():
                    outputs.append(attn.heads(call.x, call.position, call.batch)[0].double())
            real = places if len(call.x) != 1 or call.x.shape[1] != 12 else [(0, slice(0, 12))]
            for row, where in real:
                columns.append((outputs[1] - outputs[0])[row, where])
                targets.append((heads.view_as(outputs[0]).double() - outputs[0])[row, where])
        column, target = torch.cat(columns), torch.cat(targets)  # [tokens, Hq, V]
        for h in range(len(found)):
            A, b = column[:, h].reshape(-1, 1), target[:, h].reshape(-1, 1)
            best = torch.linalg.lstsq(A, b).solution.item()
            assert float(found[h]) == pytest.approx(best, rel=1e-4)
            errors = [float((A * c - b).square().sum()) for c in (best, best * 1.05, best * 0.95)]
            assert errors[0] < min(errors[1:])


def test_a_branch_without_output_keeps_its_factor(student: Any) -> None:
    model = student("composed", output={"scale": True}, feature_map="relu")
    for attn in swapped(model).values():
        attn.mixer.map_q.bias.data.fill_(-1e6)
    match_outputs(model, [{"input_ids": ids()}])
    assert all(torch.equal(a.mixer.output_scale, torch.ones(4)) for a in swapped(model).values())


def head_errors(model: Any, batch: dict[str, torch.Tensor]) -> list[float]:
    """Squared error of each swapped layer's heads over the teacher's size, the teacher's inputs given."""
    errors = []
    for attn, call, heads in seen(model, batch):
        with torch.no_grad():
            y, _ = attn.heads(call.x, call.position, call.batch)
        errors.append(float((y.flatten(2) - heads).square().sum() / heads.square().sum()))
    return errors


@pytest.mark.parametrize("key", METHODS)
def test_calibration_brings_heads_closer_to_the_teacher(student: Any, key: str) -> None:
    batches, others = [{"input_ids": ids(4, 64)}], {"input_ids": ids(4, 64, seed=9)}
    declared, model = student(key), student(key)
    calibrate(model, batches)
    for batch in (batches[0], others):
        for before, after in zip(head_errors(declared, batch), head_errors(model, batch), strict=True):
            assert after < before
    assert all(error < 1 for error in head_errors(model, batches[0])), "worse than no output at all"


@pytest.mark.parametrize("key", METHODS)
def test_calibration_is_deterministic_and_changes_only_mixers(student: Any, key: str) -> None:
    models = [student(key) for _ in range(2)]
    before = {name: tensor.clone() for name, tensor in models[0].state_dict().items()}
    for model in models:
        calibrate(model, [{"input_ids": ids()}, packed([5, 1, 17])])
        assert not any(attn.teacher for attn in swapped(model).values())
        assert not any(m._forward_hooks for m in model.modules())
    one, two = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], two[name]) for name in one)
    changed = {name for name in one if not torch.equal(one[name], before[name])}
    assert changed and all(".mixer." in name for name in changed)
    tails = {name.partition(".mixer.")[2] for name in changed}
    gates = {"gdn": {"decay.bias", "update.beta.bias"}, "gla": {"decay.bias"}, "mamba2": {"decay.bias"}}
    assert tails == {"output.scale"} | gates.get(key, {"decay.bias", "update.beta.bias"})


def test_hooks_are_gone_after_an_error(student: Any) -> None:
    model = student("gla")

    def fails(*args: Any) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        watch(model, [{"input_ids": ids()}], fails)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if m is not model.model)
    assert not any(attn.teacher for attn in swapped(model).values())


def quiet(text: str) -> None:
    pass


def recipe(source: Path, **sections: Any) -> Any:
    settings: dict[str, Any] = {
        "mixer": {"type": "gdn", "chunk_size": 16},
        "init": {"type": "calibrated", "tokens": 128},
    }
    return make_recipe(source, **{**settings, **sections})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_a_recipe_asks_for_calibration(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = {"windows": 2, "recall": False, "batch_size": 2, "split": "train", "lengths": [16]}
    sizes: list[int] = []

    def counted(model: Any, batches: Any) -> Any:
        sizes.append(sum(b["input_ids"].numel() for b in batches))
        return calibrate(model, batches)

    monkeypatch.setattr("linearize.pipeline.calibrate", counted)
    out = convert(recipe(source, stages=[], evaluation=evaluation), source / "out", say=quiet)
    points = dict(json.loads((out / "run" / "measurements.json").read_text()))
    assert list(points) == ["teacher", "untrained", "calibrated"] and sizes == [128]
    assert points["untrained"]["losses"] != points["calibrated"]["losses"]
    declared = convert(recipe(source, stages=[], init={"type": "declared"}), source / "plain", say=quiet)
    assert sizes == [128]
    before, after = weights(declared), weights(out)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name.partition(".mixer.")[2] for name in changed} == {"decay.bias", "update.beta.bias", "output.scale"}


@pytest.mark.parametrize("where", ["attention_transfer.AttentionTransfer", "finetune.Finetune"])
def test_a_resumed_conversion_ends_with_the_same_weights(
    source: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole = weights(convert(recipe(source), source / "whole", say=quiet))

    def fails(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"linearize.stages.{where}.backward", fails)
        convert(recipe(source), source / "out", say=quiet)
    resumed = weights(convert(recipe(source), source / "out", resume=True, say=quiet))
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
