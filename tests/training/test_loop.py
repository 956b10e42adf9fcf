"""The training loop: schedules, logs, checkpoints, and every way in which a run may end early."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch.optim.lr_scheduler import ReduceLROnPlateau
from trainable import dataset, make_stage, metrics, snapshot
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from linearize.errors import UserError
from linearize.registry import find, keys
from linearize.stages.base import Stage
from linearize.training import checkpoint, loop
from linearize.training.config import TrainingConfig
from linearize.training.loop import MetricsLog, stream_seed
from linearize.training.optim import Plateau, decay

GENERIC: dict[str, Any] = {"lr": 5e-2, "train": ["*.mixer.*"], "lora": {"r": 2, "dropout": 0.2}}
"""Settings that every stage gets as far as it has them; all else is its own default."""


def generic(key: str) -> dict[str, Any]:
    """Settings of the stage `key`."""
    fields = find("stages", key, Stage).Config.model_fields
    required = {"seq_len": 32} if "seq_len" in fields and fields["seq_len"].is_required() else {}
    return {name: value for name, value in GENERIC.items() if name in fields} | required


class Killed(BaseException):
    """Ends a run as a signal would: nothing in the toolkit catches it."""


@pytest.fixture
def data(tmp_path: Path, pico_tokenizer: Any) -> Any:
    return dataset(tmp_path, pico_tokenizer)


@contextmanager
def killed(step: int) -> Iterator[None]:
    """A run inside dies just before it logs `step`."""
    write = MetricsLog.write

    def dying(self: MetricsLog, at: int, values: dict[str, float]) -> None:
        if at == step:
            raise Killed
        write(self, at, values)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsLog, "write", dying)
        yield


def config(**settings: Any) -> TrainingConfig:
    return TrainingConfig(**{"type": "none", "tokens": 1, "lr": 1.0, **settings})


def same(a: Any, b: Any) -> None:
    """Every tensor of two models is bit-identical."""
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def test_schedules() -> None:
    steps, linear = 100, config(schedule="linear", warmup=0.1, min_lr_ratio=0.2)
    rates = [decay(linear, step, steps) for step in range(steps)]
    assert rates[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert rates[10] == 1.0 == max(rates)
    assert rates[55] == pytest.approx(0.2 + 0.8 * 0.5)
    assert rates[99] == pytest.approx(0.2 + 0.8 / 90)
    cosine = config(schedule="cosine", warmup=0.1, min_lr_ratio=0.2)
    assert decay(cosine, 10, steps) == 1.0
    assert decay(cosine, 55, steps) == pytest.approx(0.2 + 0.8 * 0.5)
    assert decay(cosine, 25, steps) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 6)))
    for name in ("constant", "plateau"):
        assert [decay(config(schedule=name, warmup=0.0), step, 3) for step in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_a_cosine_ends_where_those_of_transformers_and_torch_do(warmup: float) -> None:
    steps, lr, least = 40, 0.5, 0.2
    first = round(warmup * steps)

    def rates(make: Callable[[Any], Any]) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
        scheduler, found = make(optimizer), []
        for _ in range(steps - first):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return [*found, optimizer.param_groups[0]["lr"]]

    def transformers(optimizer: Any) -> Any:
        options = {"num_warmup_steps": first, "num_training_steps": steps, "min_lr_rate": least}
        made = get_cosine_with_min_lr_schedule_with_warmup(optimizer, **options)
        for _ in range(first):
            optimizer.step()
            made.step()
        return made

    ours = config(schedule="cosine", warmup=warmup, min_lr_ratio=least)
    found = [lr * decay(ours, step, steps) for step in range(first, steps + 1)]
    assert found == pytest.approx(rates(transformers), rel=1e-9)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR
    assert found == pytest.approx(rates(lambda o: torchs(o, steps - first, eta_min=least * lr)), rel=1e-6)
    assert found[-1] == pytest.approx(least * lr) and found[-2] > found[-1]


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_falls_when_that_of_torch_does(patience: int) -> None:
    rng, lr, least, window = random.Random(patience), 0.5, 0.004, 3
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    theirs = ReduceLROnPlateau(optimizer, factor=0.1, patience=patience, min_lr=least * lr)
    ours, found = Plateau(window, patience, least), []
    for step in range(60):
        losses = [max(1.0, 3 - 0.2 * step) + rng.uniform(-0.5, 0.5) for _ in range(window)]
        for loss in losses:
            assert ours.factor * lr == pytest.approx(optimizer.param_groups[0]["lr"])
            ours.update(loss)
        theirs.step(sum(losses) / window)
        found.append(ours.factor)
    assert found[0] == 1 and found[-1] == pytest.approx(least) and len(set(found)) == 4


def test_a_loss_that_falls_little_beside_its_noise_keeps_its_rate() -> None:
    plateau, rng = Plateau(TrainingConfig.model_fields["plateau_window"].default, 10), random.Random(0)
    for step in range(5000):
        plateau.update(3 * math.exp(-step / 5000) + rng.gauss(0, 0.3))
    assert plateau.factor == 1


def test_stream_seeds_differ_in_every_part() -> None:
    seeds = {stream_seed(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(4)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_steps_are_logged_with_rate_tokens_and_speed(
    converted: Callable[..., Any], data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = make_stage("finetune", steps=10, lr=1e-3, train=["*"], warmup=0.2, schedule="linear")
    stage.run(converted("lolcats"), data, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(10))
    assert [line["tokens"] for line in lines] == [128 * (step + 1) for step in range(10)]
    assert [line["lr"] for line in lines] == pytest.approx(
        [1e-3 * decay(stage.config, s, 10) for s in range(10)], abs=1e-7
    )
    assert lines[0]["lr"] == pytest.approx(1e-3 / 3, abs=1e-7)
    assert all(line["grad_norm"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    bar = capsys.readouterr().err
    assert "finetune: 100%" in bar and "tok/s" in bar
    assert f"loss={lines[-1]['loss']:.4g}" in bar
    events = list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert [path.stat().st_size > 500 for path in events] == [True]


def test_log_every_keeps_the_last_step(converted: Callable[..., Any], data: Any, tmp_path: Path) -> None:
    stage = make_stage("attention_transfer", steps=6, log_every=4)
    stage.run(converted("lolcats"), data, tmp_path / "run")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 4, 5]


def test_metrics_log_drops_what_is_written_again_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    MetricsLog(path, 1).write(1, {"loss": 0.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "loss": 1.0},
        {"step": 1, "loss": 0.5},
    ]


def test_clip_bounds_the_step(converted: Callable[..., Any], data: Any, tmp_path: Path) -> None:
    norms = {}
    for clip in (None, 1e-3):
        model = converted("lolcats")
        stage = make_stage("finetune", lr=1e-2, train=["*"], clip=clip, betas=[0.0, 0.0])
        parameters = stage.prepare(model)
        seen: list[float] = []
        step = torch.optim.AdamW.step

        def spy(self: Any, *args: Any, parameters: Any = parameters, seen: Any = seen, step: Any = step) -> Any:
            seen.append(float(torch.stack([p.grad.norm() for p in parameters.values()]).norm()))
            return step(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", spy)
            stage.run(model, data, tmp_path / str(clip))
        norms[clip] = seen[0]
        assert metrics(tmp_path / str(clip))[0]["grad_norm"] == pytest.approx(norms[None], rel=1e-4)
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert norms[None] > 0.1


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
@pytest.mark.parametrize("key", [key for key in keys("stages") if find("stages", key, Stage).trains])
def test_a_killed_run_resumes_to_the_same_bits(
    converted: Callable[..., Any], data: Any, tmp_path: Path, key: str, schedule: str
) -> None:
    settings = {"steps": 14, "checkpoint_every": 3, "schedule": schedule, **generic(key)}
    settings |= {"plateau_window": 1, "plateau_patience": 0}
    straight = converted("lolcats", "LSL")
    make_stage(key, **settings).run(straight, data, tmp_path / "straight")
    for step in (8, 10):
        with killed(step):
            make_stage(key, **settings).run(converted("lolcats", "LSL"), data, tmp_path / "killed", resume=step > 8)
    names = sorted(path.name for path in (tmp_path / "killed").glob("step-*"))
    assert names == ["step-00000006.safetensors", "step-00000009.safetensors"]
    (tmp_path / "killed" / ".step-00000012.safetensors.partial").write_bytes(b"torn")  # killed while writing
    resumed = converted("lolcats", "LSL")
    make_stage(key, **settings).run(resumed, data, tmp_path / "killed", resume=True)
    same(straight, resumed)
    one, two = metrics(tmp_path / "straight"), metrics(tmp_path / "killed")
    for line in (*one, *two):
        line.pop("tokens_per_second")
    assert one == two
    assert len({line["lr"] for line in one}) > 2
    assert sorted(path.name for path in (tmp_path / "killed").iterdir() if path.is_file()) == [
        "metrics.jsonl",
        "result.safetensors",
    ]


def test_without_resume_a_stage_starts_over(converted: Callable[..., Any], data: Any, tmp_path: Path) -> None:
    settings = {"steps": 6, "checkpoint_every": 2}
    straight, again = converted("lolcats"), converted("lolcats")
    make_stage("attention_transfer", **settings).run(straight, data, tmp_path / "straight")
    with killed(5):
        make_stage("attention_transfer", seed=1, **settings).run(converted("lolcats"), data, tmp_path / "killed")
    make_stage("attention_transfer", **settings).run(again, data, tmp_path / "killed")
    same(straight, again)
    assert [line["step"] for line in metrics(tmp_path / "killed")] == list(range(6))


def test_seconds_of_a_resumed_run_are_those_of_all_its_steps(
    converted: Callable[..., Any],
    data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    settings = {"steps": 10, "checkpoint_every": 4}
    with killed(6):
        make_stage("attention_transfer", **settings).run(converted("lolcats"), data, tmp_path / "run")
    found = [make_stage("attention_transfer", **settings).run(converted("lolcats"), data, tmp_path / "run", True)]
    found += [make_stage("attention_transfer", **settings).run(converted("lolcats"), data, tmp_path / "run", True)]
    assert found == [10, 10]


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoints(
    converted: Callable[..., Any], data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    settings = {"steps": 8, "checkpoint_every": 2, "lr": 1e-2, "schedule": "constant", "warmup": 0.0}
    stage = make_stage("attention_transfer", **settings)
    steps = iter(range(8))

    def spoiled(model: Any, batch: Any, weight: float) -> Any:
        metrics = type(stage).backward(stage, model, batch, weight)
        if next(steps) == 5:
            if what == "loss":
                metrics["loss"] = metrics["loss"] * float("nan")
            else:
                next(p for p in model.parameters() if p.grad is not None).grad[0] = float("inf")
        return metrics

    monkeypatch.setattr(stage, "backward", spoiled)
    with pytest.raises(UserError, match=f"the {what} became (nan|inf) at step 5 \\(lr 0.01, .*Lower lr, raise warmup"):
        stage.run(converted("lolcats"), data, tmp_path / "run")
    resumed, straight = converted("lolcats"), converted("lolcats")
    make_stage("attention_transfer", **settings).run(resumed, data, tmp_path / "run", resume=True)
    make_stage("attention_transfer", **settings).run(straight, data, tmp_path / "straight")
    same(resumed, straight)


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoints(
    converted: Callable[..., Any], data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 8, "checkpoint_every": 2}
    save = checkpoint.save_file

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if "00000004" not in path.name:
            return save(tensors, path, metadata)
        path.write_bytes(b"half a file")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(UserError, match="no space left while writing to .*run .*Free some space"):
            make_stage("attention_transfer", **settings).run(converted("lolcats"), data, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("*step-*")] == ["step-00000002.safetensors"]
    resumed, straight = converted("lolcats"), converted("lolcats")
    make_stage("attention_transfer", **settings).run(resumed, data, tmp_path / "run", resume=True)
    make_stage("attention_transfer", **settings).run(straight, data, tmp_path / "straight")
    same(resumed, straight)


@pytest.mark.parametrize("cut", [0, 5, 200, -1])
def test_a_damaged_checkpoint_is_named_and_deleting_it_resumes_from_the_one_before(
    converted: Callable[..., Any], data: Any, tmp_path: Path, cut: int
) -> None:
    settings = {"steps": 8, "checkpoint_every": 2}
    with killed(7):
        make_stage("attention_transfer", **settings).run(converted("lolcats"), data, tmp_path / "run")
    newest = tmp_path / "run" / "step-00000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:cut])
    with pytest.raises(UserError, match="step-00000006.safetensors is damaged .*delete that file and resume again"):
        make_stage("attention_transfer", **settings).run(converted("lolcats"), data, tmp_path / "run", resume=True)
    newest.unlink()
    resumed, straight = converted("lolcats"), converted("lolcats")
    make_stage("attention_transfer", **settings).run(resumed, data, tmp_path / "run", resume=True)
    make_stage("attention_transfer", **settings).run(straight, data, tmp_path / "straight")
    same(resumed, straight)


@pytest.mark.parametrize("field", ["plateau", "seconds", "average"])
def test_a_checkpoint_of_another_version_is_an_error_that_says_what_to_do(
    converted: Callable[..., Any], data: Any, tmp_path: Path, field: str
) -> None:
    settings = {"steps": 8, "checkpoint_every": 2, "ema": 0.9}
    with killed(3):
        make_stage("attention_transfer", **settings).run(converted("lolcats"), data, tmp_path / "run")
    newest = tmp_path / "run" / "step-00000002.safetensors"
    tensors, state = checkpoint.read_tensors(newest)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{field}/")}
    if field == "plateau":
        state["plateau"] = {"window": 100, "factor": 1.0, "best": 3.0, "losses": []}
    state.pop(field if field == "seconds" else "", None)
    checkpoint.write_tensors(newest, tensors, state)
    with pytest.raises(UserError, match=r"step-00000002\S+ was written by another version .* the stage begins anew"):
        make_stage("attention_transfer", **settings).run(converted("lolcats"), data, tmp_path / "run", resume=True)


def test_a_damaged_result_is_named(converted: Callable[..., Any], data: Any, tmp_path: Path) -> None:
    make_stage("attention_transfer").run(converted("lolcats"), data, tmp_path / "run")
    result = tmp_path / "run" / "result.safetensors"
    result.write_bytes(result.read_bytes()[:-1])
    model = converted("lolcats")
    before = snapshot(model)
    with pytest.raises(UserError, match="result.safetensors is damaged"):
        make_stage("attention_transfer").run(model, data, tmp_path / "run", resume=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_of_other_parameters_is_refused(converted: Callable[..., Any], data: Any, tmp_path: Path) -> None:
    settings = {"steps": 8, "checkpoint_every": 2}
    with killed(3):
        make_stage("attention_transfer", **settings).run(converted("lolcats"), data, tmp_path / "run")
    with pytest.raises(UserError, match="holds other parameters than this stage trains .*recipe that wrote it"):
        make_stage("finetune", train=["model.norm.weight"], **settings).run(
            converted("lolcats"), data, tmp_path / "run", resume=True
        )


def test_sizes_that_do_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="batch_size 4 is not a multiple of micro_batch_size 3"):
        config(batch_size=4, micro_batch_size=3)
    assert loop.split(config(batch_size=8, micro_batch_size=2), 2) == (2, 2)
    assert loop.split(config(batch_size=8), 4) == (2, 1)
    with pytest.raises(UserError, match="batch_size 8 does not divide into 3 processes .*multiple of 6"):
        loop.split(config(batch_size=8), 3)
