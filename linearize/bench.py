"""Speed and memory of a converted model against its softmax teacher, in one run on one machine.

`bench(student)` times both paths of the same weights in turn: the mixers, and the source model's attention in
`linearize.swap.teacher_path`. `linearize.bench_models.random_model("llama-3-8b", "lolcats")` makes a
model to time, on the spot.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from linearize.arguments import continued
from linearize.bench_training import StepSpeed, time_stages
from linearize.errors import UserError, check_target, write_whole
from linearize.evals.table import NOTHING, grid
from linearize.evals.text import evaluating
from linearize.hf.cache import StateLayer
from linearize.memory import memory_method, now, out_of_memory, peak_bytes, release
from linearize.speculative import Speculation, speculate
from linearize.stages.base import Stage
from linearize.swap import swapped, teacher_path

OUT_OF_MEMORY = "out of memory"
STEP_HEADER = ["training step", "rows x tokens", "teacher tok/s", "student tok/s", "student / teacher", "peak MiB"]
SPECULATION_HEADER = [
    "draft for target",
    "drafted",
    "accepted",
    "alone tok/s",
    "with drafts tok/s",
    "with / alone",
    "same text",
]


@dataclass(frozen=True)
class Speed:
    """One path at one context length; medians over the repeats, None where memory ran out."""

    path: str
    """teacher or student."""
    length: int
    """Tokens of context, T: the length of the prefill, and what the decoded tokens look back on."""
    prefill: float | None = None
    """Tokens per second of one forward over B x T tokens."""
    decode: float | None = None
    """Tokens per second, all rows together, one token a forward with the cache that the prefill filled."""
    cache_bytes: int | None = None
    """Bytes of that cache after prefill and decoding, all rows together."""
    peak_bytes: int | None = None
    """Peak memory of prefill and decoding; `BenchReport.memory` says how it was measured."""
    error: str | None = None


@dataclass(frozen=True)
class BenchReport:
    """What was timed, and on what."""

    speeds: list[Speed]
    steps: list[StepSpeed]
    """Training steps, by stage; empty when no stages were given."""
    settings: dict[str, Any]
    memory: str
    """How peak memory was measured."""
    speculations: list[Speculation] = field(default_factory=list)
    """Speculative decoding; empty when no prompts were given."""

    def at(self, path: str, length: int) -> Speed:
        """The row of one path at one length."""
        return next(speed for speed in self.speeds if (speed.path, speed.length) == (path, length))

    def table(self) -> str:
        """Teacher, student and student / teacher at each length."""
        header = ["tokens", "path", "prefill tok/s", "decode tok/s", "cache MiB", "peak MiB"]
        rows = []
        for length in dict.fromkeys(speed.length for speed in self.speeds):
            pair = [self.at(path, length) for path in ("teacher", "student")]
            rows += [_row(speed) for speed in pair]
            teacher, student = ([s.prefill, s.decode, s.cache_bytes, s.peak_bytes] for s in pair)
            ratios = [b / a if a and b else None for a, b in zip(teacher, student, strict=True)]
            rows.append([f"{length:,}", "student / teacher", *(NOTHING if r is None else f"{r:.3g}x" for r in ratios)])
        lines = [grid(header, rows), "", ", ".join(f"{key} {value}" for key, value in self.settings.items())]
        lines.append(f"peak: {self.memory}")
        if self.steps:
            lines += ["", grid(STEP_HEADER, [_step_row(step) for step in self.steps])]
        if self.speculations:
            lines += ["", grid(SPECULATION_HEADER, [_speculation_row(found) for found in self.speculations])]
        return "\n".join(lines)

    def to_json(self, path: str | Path) -> None:
        """Write the report; folders are created."""
        check_target(path)
        write_whole(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> BenchReport:
        """Read what `to_json` wrote."""
        values = json.loads(Path(path).read_text())
        rows = {"speeds": Speed, "steps": StepSpeed, "speculations": Speculation}
        return cls(**{**values, **{key: [row(**x) for x in values.get(key, [])] for key, row in rows.items()}})


def bench(
    student: Any,
    teacher: Any | None = None,
    *,
    lengths: Sequence[int] = (512, 2048, 8192),
    batch_size: int = 1,
    decode_tokens: int = 32,
    repeats: int = 3,
    stages: Sequence[Stage] = (),
    train_length: int = 1024,
    seed: int = 0,
    prompts: torch.Tensor | None = None,
    drafts: int = 4,
    measured: Callable[[BenchReport], None] | None = None,
) -> BenchReport:
    """Time prefill and decoding of teacher and student, interleaved so that both see the same machine.

    Args:
        student: a converted model, on the device and in the data type to be timed.
        teacher: another model; when None the student's own softmax path, on the same weights.
        lengths: context lengths in tokens.
        batch_size: rows, B.
        decode_tokens: tokens decoded greedily after each prefill.
        repeats: timed runs of each path, after one run that is not timed and measures memory.
        stages: training stages to time a step of, in their order; the student cannot be used after that.
        train_length: tokens per row of a training step.
        seed: of the random token ids.
        prompts: [N, T] token ids of text, to decode speculatively after; acceptance says nothing on random ids.
        drafts: tokens drafted at a time there.
        measured: called with the report so far after each length and each stage.

    A length that does not fit into memory gives a row that says so.
    """
    if teacher is None and not swapped(student):
        raise UserError(
            "the model to time has no swapped layers, so that it is its own teacher; give a converted model, "
            "exported without export.native"
        )
    device = student.device
    paths: dict[str, tuple[Any, Callable[[], AbstractContextManager]]] = {
        "teacher": (student, lambda: teacher_path(student)) if teacher is None else (teacher, nullcontext),
        "student": (student, nullcontext),
    }
    generator = torch.Generator().manual_seed(seed)
    settings = {
        "batch": batch_size,
        "decode tokens": decode_tokens,
        "repeats": repeats,
        "dtype": str(student.dtype).removeprefix("torch."),
        "device": _device_name(device),
        "torch": torch.__version__,
    }
    report = BenchReport([], [], settings, memory_method(device))
    measured = measured or (lambda report: None)
    for length in lengths:
        release()
        ids = torch.randint(student.config.get_text_config().vocab_size, (batch_size, length), generator=generator).to(
            device
        )
        runs: dict[str, list[tuple[float, float, int]]] = {path: [] for path in paths}
        peaks: dict[str, int] = {}
        for repeat in range(repeats + 1):
            for path, (model, context) in paths.items():
                if repeat and path not in peaks:
                    continue
                with context(), out_of_memory() as memory_error:
                    if repeat == 0:
                        peaks[path] = peak_bytes(partial(_generate, model, ids, decode_tokens), device)
                    else:
                        runs[path].append(_generate(model, ids, decode_tokens))
                if memory_error:
                    peaks.pop(path, None)
        for path in paths:
            report.speeds.append(_speed(path, length, batch_size, decode_tokens, runs[path], peaks.get(path)))
        measured(report)
    if prompts is not None:
        report.speculations.extend(speculate(student, prompts, drafts=drafts))
        measured(report)
    for step in time_stages(student, stages, batch=batch_size, length=train_length, repeats=repeats, seed=seed):
        report.steps.append(step)
        measured(report)
    return report


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes that a cache keeps alive: the storages of its tensors, each counted once."""
    trees = [layer.state if isinstance(layer, StateLayer) else vars(layer) for layer in cache.layers]
    storages = [t.untyped_storage() for t in tree_leaves(trees) if isinstance(t, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _generate(model: Any, ids: torch.Tensor, decode_tokens: int) -> tuple[float, float, int]:
    """Seconds of the prefill of ids [B, T] and of the decoding after it, and the bytes of the final cache."""
    cache = DynamicCache(config=model.config)
    with evaluating(model):
        began = now(ids.device)
        token = _next(model, ids, cache)
        filled = now(ids.device)
        for _ in range(decode_tokens):
            token = _next(model, token, cache)
        return filled - began, now(ids.device) - filled, cache_bytes(cache)


def _next(model: Any, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    logits = continued(model, cache, input_ids=ids, logits_to_keep=1).logits
    return logits[:, -1:].argmax(-1)


def _speed(
    path: str,
    length: int,
    batch: int,
    decode_tokens: int,
    runs: list[tuple[float, float, int]],
    peak: int | None,
) -> Speed:
    if peak is None:
        return Speed(path, length, error=OUT_OF_MEMORY)
    prefill, decode, cache = (statistics.median(values) for values in zip(*runs, strict=True))
    return Speed(path, length, batch * length / prefill, batch * decode_tokens / decode, int(cache), peak)


def _row(speed: Speed) -> list[str]:
    if speed.error:
        return [f"{speed.length:,}", speed.path, speed.error, NOTHING, NOTHING, NOTHING]
    mib = [NOTHING if size is None else f"{size / 2**20:,.2f}" for size in (speed.cache_bytes, speed.peak_bytes)]
    return [f"{speed.length:,}", speed.path, f"{speed.prefill:,.0f}", f"{speed.decode:,.1f}", *mib]


def _step_row(step: StepSpeed) -> list[str]:
    size = f"{step.batch} x {step.length:,}"
    if step.student is None or step.peak_bytes is None:
        return [step.stage, size, OUT_OF_MEMORY, NOTHING, NOTHING, NOTHING]
    ratio = NOTHING if step.teacher is None else f"{step.student / step.teacher:.3g}x"
    teacher = NOTHING if step.teacher is None else f"{step.teacher:,.0f}"
    return [step.stage, size, teacher, f"{step.student:,.0f}", ratio, f"{step.peak_bytes / 2**20:,.2f}"]


def _speculation_row(found: Speculation) -> list[str]:
    counts = [f"{found.drafted:,}", f"{found.acceptance:.0%}"]
    ratio = f"{found.assisted / found.plain:.3g}x"
    speeds = [f"{found.plain:,.1f}", f"{found.assisted:,.1f}", ratio]
    return [f"{found.draft} for {found.target}", *counts, *speeds, f"{found.same:.0%}"]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
