"""Times one optimiser step of each training stage on a converted model, beside the same step of its softmax teacher.

`time_stages(model, stages)` changes the model (adapters, trained types), so it comes last in `linearize bench`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from linearize.memory import now, out_of_memory, peak_bytes, release
from linearize.stages.base import Stage
from linearize.swap import softmax_path
from linearize.training.optim import adamw
from linearize.training.precision import autocast


@dataclass(frozen=True)
class StepSpeed:
    """One optimiser step of a stage; medians over the repeats, None where memory ran out or there is no such step."""

    stage: str
    """Type of the stage."""
    batch: int
    """Rows of the step, all in one forward."""
    length: int
    """Tokens per row."""
    student: float | None
    """Tokens per second of the stage's step."""
    teacher: float | None
    """Tokens per second of the same step with softmax attention; None for stages that are no end-to-end step."""
    peak_bytes: int | None
    """Peak memory of the stage's step, weights and optimiser included."""


def time_stages(
    model: Any, stages: Sequence[Stage], *, batch: int = 1, length: int = 1024, repeats: int = 3, seed: int = 0
) -> Iterator[StepSpeed]:
    """Time a step of each stage in turn on random tokens, as each is asked for; teacher and student alternate.

    Args:
        model: a converted model; unusable afterwards.
        stages: in the order in which a conversion would run them.
        batch: rows of a step.
        length: tokens per row.
        repeats: timed steps of each path, after one that is not timed, of which the student's measures memory.
        seed: of the random tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.get_text_config().vocab_size, (batch, length), generator=generator).to(
        model.device
    )
    for stage in (stage for stage in stages if stage.trains):
        release()
        with stage.precise(model):
            speed = _time_stage(model, stage, ids, repeats)
        yield speed


def _time_stage(model: Any, stage: Stage, ids: torch.Tensor, repeats: int) -> StepSpeed:
    ids = ids.repeat(stage.item_rows, 1)
    rows, length = ids.shape
    batch = stage.completed(model, {"input_ids": ids, "labels": ids})
    _, parameters = stage.begin(model)
    groups = [{"params": list(parameters.values()), "lr_scale": 1.0}]
    step = partial(_step, model, stage, adamw(groups, stage.config), batch)
    paths: dict[str, Callable[[], AbstractContextManager]] = {"student": nullcontext}
    if stage.end_to_end:
        paths["teacher"] = partial(softmax_path, model)
    seconds: dict[str, list[float]] = {path: [] for path in paths}
    peak = None
    with out_of_memory() as memory_error:
        for repeat in range(repeats + 1):
            for path, context in paths.items():
                with context():
                    if repeat == 0 and path == "student":
                        peak = peak_bytes(step, ids.device)
                    elif repeat == 0:
                        step()
                    else:
                        began = now(ids.device)
                        step()
                        seconds[path].append(now(ids.device) - began)
    if memory_error:
        return StepSpeed(stage.config.type, rows, length, None, None, None)
    speed = {path: ids.numel() / statistics.median(times) for path, times in seconds.items()}
    return StepSpeed(stage.config.type, rows, length, speed["student"], speed.get("teacher"), peak)


def _step(model: Any, stage: Stage, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    with autocast(stage.config, batch["input_ids"].device):
        stage.backward(model, batch, 1 / stage.count(batch))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
