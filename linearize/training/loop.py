"""The training loop that all stages share.

A stage says which parameters train and how one micro-batch is turned into gradients; the loop does the rest: data
order, accumulation, gradient exchange between processes, clipping, AdamW, schedule, progress, metrics, checkpoints.
Everything is a function of the step number, so that a killed run resumes to the same weights.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.utils import clip_grad_norm_

from linearize.data import Rows, batches
from linearize.errors import UserError, disk_full
from linearize.progress import bar
from linearize.training.checkpoint import load_checkpoint, newest_checkpoint, other_version, save_checkpoint
from linearize.training.config import TrainingConfig
from linearize.training.interrupt import between_steps
from linearize.training.optim import Average, Plateau, adamw, decay
from linearize.training.precision import autocast
from linearize.training.processes import processes, summed

Batch = dict[str, torch.Tensor]
Metrics = dict[str, torch.Tensor]


def train(
    config: TrainingConfig,
    parameters: dict[str, torch.nn.Parameter],
    data: Rows,
    folder: Path,
    *,
    backward: Callable[[Batch, float], Metrics],
    count: Callable[[Batch], int],
    lr_scale: Callable[[str], float] = lambda name: 1.0,
    at: Callable[[float], None] = lambda done: None,
    resume: bool = False,
    facts: Mapping[str, Any] = {},  # only read
) -> float:
    """Train `parameters` in place.

    Args:
        config: the stage's settings.
        parameters: name -> parameter, float32.
        data: packed sequences of the stage's length.
        folder: where metrics.jsonl, the TensorBoard events and the checkpoints go.
        backward: runs forward and backward of one micro-batch with its summed loss times the given weight and returns
            summed metrics; "loss" among them.
        count: how many items a micro-batch's summed loss has (tokens, mostly); gradients are means over the step.
        lr_scale: factor on the learning rate by parameter name.
        at: called before each step with the share of the steps that are done; what it draws is the same in all
            processes.
        resume: start from the newest checkpoint in `folder` if there is one.
        facts: plain data that checkpoints hold beside what is needed to go on.

    Returns:
        Seconds that the optimiser steps took, those before a resume included.

    Raises:
        UserError: when the loss or a gradient stops being finite, the disk is full, or a checkpoint is damaged.
    """
    device = next(iter(parameters.values())).device
    accelerator = _accelerator(folder, device)
    world, rank = accelerator.num_processes, accelerator.process_index
    micro, accumulate = split(config, world)
    per_step, steps = config.batch_size * data.item_tokens, config.steps(data.item_tokens)
    optimizer = adamw(_groups(parameters, lr_scale), config)
    plateau = Plateau(config.plateau_window, config.plateau_patience, config.min_lr_ratio)
    start, seconds = 0, 0.0
    average = Average(config.ema, parameters) if config.ema is not None else None
    averages = average.values if average else None
    if resume and (state := load_checkpoint(folder, parameters, optimizer, averages)):
        start, seconds, plateau = _progress(state, folder)
    log = MetricsLog(folder / "metrics.jsonl", start) if accelerator.is_main_process else None
    feed = batches(data, micro, config.seed, start * accumulate, rank, world)
    drawn = bar(config.type, unit="tok", total=steps * per_step, initial=start * per_step)
    with between_steps() as stop, drawn as shown:
        for step in range(start, steps):
            began = time.perf_counter()
            torch.manual_seed(stream_seed(config.seed, step))
            at(step / steps)
            torch.manual_seed(stream_seed(config.seed, step, rank))
            micros = [{k: v.to(device, non_blocking=True) for k, v in next(feed).items()} for _ in range(accumulate)]
            values = _gradients(config, parameters, micros, backward, count)
            values["grad_norm"] = float(clip_grad_norm_(parameters.values(), config.clip or math.inf))
            factor = decay(config, step, steps) * plateau.factor
            values["lr"] = config.lr * factor
            _check_finite(values, step, config, folder)
            for group in optimizer.param_groups:
                group["lr"] = values["lr"] * group["lr_scale"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average:
                average.update(step, parameters)
            if config.schedule == "plateau":
                plateau.update(values["loss"])
            took = time.perf_counter() - began
            seconds += took
            values |= {"tokens": (step + 1) * per_step, "tokens_per_second": per_step / took}
            shown.set_postfix(loss=f"{values['loss']:.4g}", lr=f"{values['lr']:.2g}", refresh=False)
            shown.update(per_step)
            if step % config.log_every == 0 or step == steps - 1:
                accelerator.log(values, step=step)
                if log:
                    log.write(step, values)
            stopped = stop()
            due = (step + 1) % config.checkpoint_every == 0 and step + 1 < steps
            if (due or stopped is not None) and accelerator.is_main_process:
                state = {**facts, "plateau": asdict(plateau), "seconds": seconds}
                save_checkpoint(folder, step + 1, parameters, optimizer, state, averages)
            if stopped is not None:
                raise stopped
    if average:
        average.copy_to(parameters)
    for tracker in accelerator.trackers:  # not end_training(), which would also end the process group of later stages
        tracker.finish()
    return seconds


def _progress(state: Mapping[str, Any], folder: Path) -> tuple[int, float, Plateau]:
    """Steps that a checkpoint's state has behind it, their seconds, and the plateau.

    Raises:
        UserError: for a state of another version, which has other fields.
    """
    try:
        return state["step"], state["seconds"], Plateau(**state["plateau"])
    except (KeyError, TypeError) as error:
        raise other_version(newest_checkpoint(folder), error) from error


def stream_seed(*parts: int) -> int:
    """A 32-bit seed from several numbers; PyTorch's CPU generator reads no more bits than that."""
    return zlib.crc32(repr(parts).encode())


class MetricsLog:
    """metrics.jsonl: one JSON object a line; a resumed run drops the lines that it is about to write again."""

    def __init__(self, path: Path, start: int):
        kept = []
        if path.exists():
            lines = (line for line in path.read_text().splitlines() if line.endswith("}"))
            kept = [line for line in lines if json.loads(line)["step"] < start]
        partial = path.with_suffix(".partial")
        with disk_full(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text("".join(f"{line}\n" for line in kept))
        os.replace(partial, path)
        self._path = path

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one step's values."""
        with disk_full(self._path.parent), open(self._path, "a") as file:
            file.write(json.dumps({"step": step, **{k: round(v, 7) for k, v in values.items()}}) + "\n")


def _accelerator(folder: Path, device: torch.device) -> Accelerator:
    """Joins the processes that torchrun started, over gloo for a model on CPUs, and opens the TensorBoard log."""
    on_cpu = processes() > 1 and device.type == "cpu"
    accelerator = Accelerator(cpu=on_cpu, log_with="tensorboard", project_dir=str(folder))
    assert accelerator.num_processes == processes(), "accelerate did not join the processes"
    accelerator.init_trackers("tensorboard")
    return accelerator


def split(config: TrainingConfig, world: int) -> tuple[int, int]:
    """Sequences per forward pass, and forward passes per step, of one of `world` processes.

    Raises:
        UserError: where the batch does not divide among them.
    """
    micro = config.micro_batch_size or max(1, config.batch_size // world)
    if config.batch_size % (micro * world):
        raise UserError(
            f"batch_size {config.batch_size} does not divide into {world} processes of micro_batch_size {micro}; "
            f"make it a multiple of {micro * world}"
        )
    return micro, config.batch_size // (micro * world)


def _gradients(
    config: TrainingConfig,
    parameters: dict[str, torch.nn.Parameter],
    micros: list[Batch],
    backward: Callable[[Batch, float], Metrics],
    count: Callable[[Batch], int],
) -> dict[str, float]:
    """Fill `.grad` with the mean gradient over this step's items of all processes; returns the mean metrics."""
    device = micros[0]["input_ids"].device
    items = max(1.0, float(summed(torch.tensor(float(sum(count(m) for m in micros)), device=device))))
    metrics: Metrics = {}
    for batch in micros:
        with autocast(config, device):
            for key, value in backward(batch, 1 / items).items():
                metrics[key] = metrics.get(key, torch.zeros((), device=device)) + value.detach()
    _exchange(parameters.values(), device)
    return {key: float(summed(value)) / items for key, value in metrics.items()}


def _exchange(parameters: Collection[torch.nn.Parameter], device: torch.device) -> None:
    """Sum gradients over all processes, in each of which others may be missing: an expert that no token reached, say.

    A parameter that has none in any process keeps none, so that the optimiser leaves it alone.
    """
    if processes() == 1:
        return
    found = summed(torch.tensor([float(p.grad is not None) for p in parameters], device=device))
    for p, somewhere in zip(parameters, found.tolist(), strict=True):
        if somewhere:
            p.grad = summed(torch.zeros_like(p) if p.grad is None else p.grad)


def _groups(parameters: dict[str, torch.nn.Parameter], lr_scale: Callable[[str], float]) -> list[dict]:
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, p in parameters.items():
        groups.setdefault(lr_scale(name), []).append(p)
    return [{"params": params, "lr_scale": scale} for scale, params in groups.items()]


def _check_finite(values: dict[str, float], step: int, config: TrainingConfig, folder: Path) -> None:
    """A gradient that overflows under a finite loss would spoil the weights and the next checkpoint."""
    for what, value in (("loss", values["loss"]), ("gradient norm", values["grad_norm"])):
        if not math.isfinite(value):
            raise UserError(
                f"stage {config.type}: the {what} became {value} at step {step} (lr {values['lr']:.3g}, precision "
                f"{config.precision}); nothing of this step was kept. Lower lr, raise warmup, set clip or "
                f"precision=fp32, and go on with --resume: what stages before this one did is kept, in {folder.parent}"
            )
