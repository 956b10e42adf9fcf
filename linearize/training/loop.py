"""The training loop that all stages share.

A stage says which parameters train and how one micro-batch is turned into gradients; the loop does the rest: data
order, accumulation, gradient exchange between processes, clipping, AdamW, schedule, progress, metrics, checkpoints.
Everything is a function of the step number, so that a killed run resumes to the same weights.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from tqdm.auto import tqdm

from linearize.data import PackedDataset, batches
from linearize.errors import UserError, disk_full
from linearize.training.checkpoint import load_checkpoint, save_checkpoint
from linearize.training.config import TrainingConfig
from linearize.training.optim import Plateau, adamw, decay

Batch = dict[str, torch.Tensor]
Metrics = dict[str, torch.Tensor]


def train(
    config: TrainingConfig,
    parameters: dict[str, torch.nn.Parameter],
    data: PackedDataset,
    folder: Path,
    *,
    backward: Callable[[Batch, float], Metrics],
    count: Callable[[Batch], int],
    lr_scale: Callable[[str], float] = lambda name: 1.0,
    resume: bool = False,
) -> None:
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
        resume: start from the newest checkpoint in `folder` if there is one.

    Raises:
        UserError: when the loss stops being finite, the disk is full, or a checkpoint is damaged.
    """
    accelerator = Accelerator(log_with="tensorboard", project_dir=str(folder))
    world, rank = accelerator.num_processes, accelerator.process_index
    micro = config.micro_batch_size or config.batch_size
    if config.batch_size % (micro * world):
        raise UserError(
            f"batch_size {config.batch_size} does not divide into {world} processes of micro_batch_size {micro}; "
            f"make it a multiple of {micro * world}"
        )
    accumulate = config.batch_size // (micro * world)
    per_step = config.batch_size * data.seq_len
    steps = config.steps(data.seq_len)
    optimizer = adamw(_groups(parameters, lr_scale), config)
    plateau = Plateau(config.plateau_patience)
    start = 0
    if resume and (state := load_checkpoint(folder, parameters, optimizer)):
        start, plateau = state["step"], Plateau(**state["plateau"])
    log = MetricsLog(folder / "metrics.jsonl", start) if accelerator.is_main_process else None
    accelerator.init_trackers("tensorboard")
    device = next(iter(parameters.values())).device
    feed = batches(data, micro, config.seed, start * accumulate, rank, world)
    bar = tqdm(
        total=steps * per_step,
        initial=start * per_step,
        desc=config.type,
        unit="tok",
        unit_scale=True,
        disable=not accelerator.is_local_main_process,
    )
    for step in range(start, steps):
        began = time.perf_counter()
        torch.manual_seed(stream_seed(config.seed, step, rank))
        micros = [{k: v.to(device, non_blocking=True) for k, v in next(feed).items()} for _ in range(accumulate)]
        items = _summed(torch.tensor(float(sum(count(m) for m in micros)), device=device), world)
        metrics: Metrics = {}
        for batch in micros:
            with autocast(config, device):
                for key, value in backward(batch, 1 / max(1.0, float(items))).items():
                    metrics[key] = metrics.get(key, torch.zeros((), device=device)) + value.detach()
        if world > 1:
            for p in parameters.values():
                dist.all_reduce(p.grad)
        values = {key: float(_summed(value, world) / items) for key, value in metrics.items()}
        _check_finite(values["loss"], step, config, folder)
        factor = decay(config, step, steps) * plateau.factor
        for group in optimizer.param_groups:
            group["lr"] = config.lr * factor * group["lr_scale"]
        if config.clip is not None:
            values["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if config.schedule == "plateau":
            plateau.update(values["loss"])
        seconds = time.perf_counter() - began
        values |= {
            "lr": config.lr * factor,
            "tokens": (step + 1) * per_step,
            "tokens_per_second": per_step / seconds,
        }
        bar.update(per_step)
        bar.set_postfix(loss=f"{values['loss']:.4g}", lr=f"{values['lr']:.2g}", refresh=False)
        if step % config.log_every == 0 or step == steps - 1:
            accelerator.log(values, step=step)
            if log:
                log.write(step, values)
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < steps and accelerator.is_main_process:
            save_checkpoint(folder, step + 1, dict(parameters), optimizer, {"plateau": asdict(plateau)})
    bar.close()
    accelerator.end_training()


def stream_seed(*parts: int) -> int:
    """A 32-bit seed from several numbers; PyTorch's CPU generator reads no more bits than that."""
    return zlib.crc32(repr(parts).encode())


def autocast(config: TrainingConfig, device: torch.device) -> Any:
    """The compute precision that `config` asks for on `device`."""
    wanted = config.precision
    if wanted == "auto":
        wanted = "bf16" if device.type == "cuda" else "fp32"
    return torch.autocast(device.type, torch.bfloat16) if wanted == "bf16" else nullcontext()


class MetricsLog:
    """metrics.jsonl: one JSON object a line; a resumed run drops the lines that it is about to write again."""

    def __init__(self, path: Path, start: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            lines = (line for line in path.read_text().splitlines() if line.endswith("}"))
            kept = [line for line in lines if json.loads(line)["step"] < start]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._path = path

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one step's values."""
        with disk_full(self._path.parent), open(self._path, "a") as file:
            file.write(json.dumps({"step": step, **{k: round(v, 7) for k, v in values.items()}}) + "\n")


def _groups(parameters: dict[str, torch.nn.Parameter], lr_scale: Callable[[str], float]) -> list[dict]:
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, p in parameters.items():
        groups.setdefault(lr_scale(name), []).append(p)
    return [{"params": params, "lr_scale": scale} for scale, params in groups.items()]


def _summed(value: torch.Tensor, world: int) -> torch.Tensor:
    if world > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def _check_finite(loss: float, step: int, config: TrainingConfig, folder: Path) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"stage {config.type}: the loss became {loss} at step {step} (lr {config.lr:g}, precision "
            f"{config.precision}); nothing of this step was kept. Lower lr, raise warmup, set clip or precision=fp32; "
            f"earlier checkpoints are in {folder}"
        )
