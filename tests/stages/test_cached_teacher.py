"""`logit_kl` with the teacher's predictions on disk: losses of the live one, and every way in which files may fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainable import dataset, make_stage, metrics

from linearize.bench_training import time_stages
from linearize.data import visited
from linearize.errors import UserError
from linearize.stages.tuning import cached
from linearize.swap import source_weights, swapped

LAYERS = "LSL"


class Killed(BaseException):
    """Ends a run as a signal would."""


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "SHARD_VALUES", 32 * 7 * 8)  # eight rows of 32 tokens with top_k 6


def stage_of(teacher: str, **settings: Any) -> Any:
    values = {"teacher": teacher, "top_k": 6, "train": ["*"], "lr": 1e-3, "precision": "fp32", **settings}
    return make_stage("logit_kl", **values)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "teacher").glob("*"))


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each forward of the teacher, as they happen."""
    seen: list[int] = []
    cls = type(make_stage("logit_kl"))
    predictions = cls.predictions

    def spy(self: Any, model: Any, batch: Any) -> Any:
        seen.append(len(batch["input_ids"]))
        return predictions(self, model, batch)

    monkeypatch.setattr(cls, "predictions", spy)
    return seen


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 2.0, "ce": 0.25},
        {"temperature": 2.0, "teacher_temperature": 1.25},
        {"divergence": "reverse", "micro_batch_size": 1, "head_chunk": 5},
        {"divergence": "jensen_shannon", "temperature": 0.5, "micro_batch_size": 2},
    ],
    ids=["kl", "ce", "calibrated", "reverse", "jensen"],
)
def test_training_is_that_of_the_live_teacher(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, packing: bool, settings: dict[str, Any]
) -> None:
    data = dataset(tmp_path, pico_tokenizer, packing=packing, limit_documents=40)
    steps = len(data) // 4 + 6  # more than an epoch, and not a whole number of them
    assert steps * 4 > len(data) + 8
    results = {}
    for teacher in ("live", "cached"):
        model = converted("gdn", LAYERS)
        stage_of(teacher, steps=steps, **settings).run(model, data, tmp_path / teacher)
        results[teacher] = metrics(tmp_path / teacher), model.state_dict()
    for a, b in zip(results["live"][0], results["cached"][0], strict=True):
        for key in ("loss", "kl", "ce"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    for name, tensor in results["live"][1].items():
        torch.testing.assert_close(results["cached"][1][name], tensor, atol=2e-4, rtol=1e-3)
    assert not (tmp_path / "cached" / "teacher").exists()


def test_gradients_are_the_live_ones(converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path) -> None:
    data, found = dataset(tmp_path, pico_tokenizer), []
    for teacher in ("live", "cached"):
        model = converted("gdn", LAYERS)
        stage = stage_of(teacher, steps=5)
        rows = stage.rows(model, data, tmp_path / "run", resume=False)
        parameters = stage.begin(model)[1]
        batch = rows.batch(visited(data, 20, 0)[3:7])
        assert (cached.LOG_PROBS in batch) == (teacher == "cached")
        stage.backward(model, batch, 1 / stage.count(batch))
        found.append({name: p.grad for name, p in parameters.items()})
    assert batch[cached.TOKENS].dtype == torch.int32 and batch[cached.LOG_PROBS].dtype == torch.float32
    torch.testing.assert_close(batch[cached.LOG_PROBS].exp().sum(-1), torch.ones(len(batch[cached.TOKENS])))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_the_teacher_is_asked_once_per_visited_row_and_nothing_is_kept_for_it(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, seen, model = dataset(tmp_path, pico_tokenizer), watched(monkeypatch), converted("gdn", LAYERS)
    calls: list[bool] = []
    hook = next(iter(swapped(model).values())).register_forward_hook(lambda m, a, o: calls.append(m.teacher))
    stage_of("cached", steps=3).run(model, data, tmp_path / "few")
    hook.remove()
    assert len(data) > 12 == sum(seen), "no more rows than the stage visits"
    assert calls == [True] * len(seen) + [False] * 3
    assert not source_weights(model)._other
    stage = stage_of("cached", steps=3)
    assert stage.needs_teacher and not stage.keeps_source
    kept = converted("gdn", LAYERS)
    stage.run(kept, data, tmp_path / "kept", keep_source=True)
    assert source_weights(kept)._other, "a later stage may still need the source"


def test_a_killed_precomputation_goes_on_and_a_killed_training_reuses_it(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, seen = dataset(tmp_path, pico_tokenizer), watched(monkeypatch)
    settings = {"steps": 8, "checkpoint_every": 2}
    straight, resumed = converted("gdn", LAYERS), converted("gdn", LAYERS)
    stage_of("cached", **settings).run(straight, data, tmp_path / "straight")
    whole, folder = sum(seen), tmp_path / "killed"
    write = cached.write_tensors

    def dying(path: Path, *args: Any) -> None:
        if "00002" in path.name:
            path.parent.joinpath(f".{path.name}.partial").write_bytes(b"torn")
            raise Killed
        write(path, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(cached, "write_tensors", dying)
        stage_of("cached", **settings).run(converted("gdn", LAYERS), data, folder)
    assert [name for name in files(folder) if name.startswith("shard")] == [
        f"shard-0000{i}.safetensors" for i in (0, 1)
    ]
    seen.clear()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stage = stage_of("cached", **settings)
        backward, steps = stage.backward, iter(range(100))

        def stopping(*args: Any) -> Any:
            if next(steps) == 5:
                raise Killed
            return backward(*args)

        patch.setattr(stage, "backward", stopping)
        stage.run(converted("gdn", LAYERS), data, folder, resume=True)
    assert sum(seen) == whole - 16, "the two files that were complete are not made again"
    seen.clear()
    stage_of("cached", **settings).run(resumed, data, folder, resume=True)
    assert not seen, "nothing is asked twice"
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert not (folder / "teacher").exists()
    stage_of("cached", **settings).run(converted("gdn", LAYERS), data, folder)
    assert sum(seen) == whole, "without resume a stage starts over"


@pytest.mark.parametrize("cut", [0, 5, -1])
def test_a_damaged_file_is_named_and_deleting_it_is_enough(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, cut: int
) -> None:
    data, model = dataset(tmp_path, pico_tokenizer), converted("gdn", LAYERS)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    stage_of("cached", steps=6).rows(model, data, tmp_path / "run", resume=False)
    path = tmp_path / "run" / "teacher" / "shard-00001.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:cut])
    with pytest.raises(UserError, match="shard-00001.safetensors are damaged .*delete that file and resume"):
        stage_of("cached", steps=6).run(model, data, tmp_path / "run", resume=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    path.unlink()
    stage_of("cached", steps=6).rows(model, data, tmp_path / "run", resume=True)
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    ("settings", "what"), [({"temperature": 2.0}, "temperature"), ({"seed": 1}, "rows"), ({}, "data")]
)
def test_files_of_something_else_are_not_read(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, settings: dict[str, Any], what: str
) -> None:
    data, model = dataset(tmp_path, pico_tokenizer), converted("gdn", LAYERS)
    stage_of("cached", steps=3).rows(model, data, tmp_path / "run", resume=False)
    if what == "data":
        (tmp_path / "other").mkdir()
        data = dataset(tmp_path / "other", pico_tokenizer)
    with pytest.raises(UserError, match=f"were made for other {what}; delete that file"):
        stage_of("cached", steps=3, **settings).rows(model, data, tmp_path / "run", resume=True)


@pytest.mark.parametrize("top_k", [None, 97])
def test_the_whole_vocabulary_is_refused_with_its_size(converted: Callable[..., Any], top_k: int | None) -> None:
    stage = make_stage("logit_kl", teacher="cached", train=["*"], top_k=top_k, tokens=10**9)
    with pytest.raises(UserError, match="all 97 log-probabilities .* 388 GB for 1,000,000,000 tokens; set top_k"):
        stage.check(converted("gdn", LAYERS))


@pytest.mark.parametrize("teacher", ["live", "cached"])
def test_no_more_tokens_are_kept_than_there_are(converted: Callable[..., Any], teacher: str) -> None:
    stage = make_stage("logit_kl", teacher=teacher, train=["*"], top_k=98)
    with pytest.raises(UserError, match="top_k 98 is more than the vocabulary of 97"):
        stage.check(converted("gdn", LAYERS))


def test_a_benchmark_times_the_step_without_the_teacher(converted: Callable[..., Any]) -> None:
    stage = stage_of("cached")
    (speed,) = time_stages(converted("gdn", LAYERS), [stage], length=32, repeats=1)
    assert speed.student and speed.student > 0
