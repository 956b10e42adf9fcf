"""Views of what a conversion leaves besides measurements: training curves, layers, caches, speed and memory.

All functions take plain data that `linearize.report.sources` read, and give nothing where there is nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from linearize.bench import BenchReport, Speed
from linearize.evals.table import union
from linearize.evals.views import Bars, HeatMap, Lines, Number, Table, View
from linearize.report.sources import Source, StageLog

POINTS = 200
"""Points of a training curve; where more steps were logged, each is the mean of consecutive ones."""
COLUMNS = 12
"""Of a heat map of layers over training."""
LENGTHS = [2**n for n in range(9, 18, 2)]
"""Tokens at which caches are compared."""
NO_LOSS = ("step", "tokens", "tokens_per_second", "lr", "grad_norm")
MIB = 2**20


def training_views(models: Sequence[Source]) -> list[View]:
    """What each stage minimised, and its other losses, over its tokens."""
    views: list[View] = []
    for stage in union(log.name for model in models for log in model.stages):
        logs = {model.name: log for model in models for log in model.stages if log.name == stage}
        keys = union(key for log in logs.values() for key in log.logged())
        losses = [key for key in keys if key not in NO_LOSS and not key.startswith("layer_")]
        for key in sorted(losses, key=lambda key: key != "loss"):
            curves = {name: thinned(log.curve(key)) for name, log in logs.items() if log.curve(key)}
            if key != "loss" and all(log.curve(key) == log.curve("loss") for log in logs.values()):
                continue
            title = f"{_stage(stage)}: {'training loss' if key == 'loss' else key}"
            views.append(_over_tokens(title, curves, key, log_y=key == "loss"))
    return views


def schedule_views(models: Sequence[Source]) -> list[View]:
    """Learning rate, norm of the gradient and speed over the tokens of all stages, one after the other."""
    views: list[View] = []
    for key, title, unit in (
        ("lr", "Learning rate", "learning rate"),
        ("grad_norm", "Norm of the gradient, before clipping", "L2 norm"),
        ("tokens_per_second", "Speed of training", "tokens per second"),
    ):
        curves = {model.name: thinned(_joined(model.stages, key)) for model in models if model.stages}
        curves = {name: points for name, points in curves.items() if points}
        if curves:
            views.append(_over_tokens(title, curves, unit, log_y=key == "grad_norm", all_stages=True))
    return views


def layer_views(models: Sequence[Source]) -> list[View]:
    """Losses by layer at the end of each stage that has them and their course, scores of a selector, cache sizes."""
    views: list[View] = []
    for stage in union(log.name for model in models for log in model.stages):
        logs = {m.name: log for m in models for log in m.stages if log.name == stage and _layers(log)}
        if not logs:
            continue
        last = {name: {i: _final(log.curve(f"layer_{i}")) for i in _layers(log)} for name, log in logs.items()}
        layers = sorted(union(i for found in last.values() for i in found))
        heights = {name: [found.get(i) for i in layers] for name, found in last.items()}
        title, note = f"{_stage(stage)}: loss by layer at its end", "Mean of the last tenth of the logged steps."
        labels = [f"layer {i}" for i in layers]
        views.append(Bars(title, note, y_label="loss", labels=labels, series=heights, log_y=True))
        if len(models) == 1:
            views += [_course(stage, log) for log in logs.values()]
    scored = {model.name: model.scores for model in models if model.scores}
    if scored:
        layers = sorted(union(i for scores in scored.values() for i in scores))
        worth = {name: [scores.get(i) for i in layers] for name, scores in scored.items()}
        labels = [f"layer {i}" for i in layers]
        note = "What the selector found on the source model, in its first round; the highest kept their softmax."
        views.append(Bars("Worth of each layer's softmax", note, y_label="score", labels=labels, series=worth))
    return views


def cache_views(models: Sequence[Source]) -> list[View]:
    """Bytes of one sequence's cache against its length, from the plans; softmax of each source model once."""
    curves: dict[str, list[tuple[float, float]]] = {}
    told = [model for model in models if model.conversion.facts.get("causal", True)]
    several = len(union(model.conversion.facts["source"] for model in told)) > 1
    for model in told:
        facts = model.conversion.facts
        source = f"softmax ({facts['source']})" if several else "softmax"
        curves[source] = [(n, cache_bytes(facts, n, converted=False) / MIB) for n in LENGTHS]
    curves |= {m.name: [(n, cache_bytes(m.conversion.facts, n) / MIB) for n in LENGTHS] for m in told}
    curves = {name: points for name, points in curves.items() if all(y > 0 for _, y in points)}
    if not curves:
        return []
    note = "Computed from the plan, for one sequence in the type of the weights."
    axes: dict[str, Any] = {"x_label": "tokens of context", "y_label": "MiB", "log_x": True, "log_y": True}
    return [Lines("Cache of a sequence", note, series=curves, **axes)]


def cache_bytes(facts: Mapping[str, Any], tokens: int, *, converted: bool = True) -> int:
    """Bytes of one sequence's cache after `tokens` tokens, of the converted model or its source; see `facts_of`."""
    kept = [letter == "S" or not converted for letter in facts["layers"]]
    reach = facts.get("reach") or [None] * len(kept)
    caches = [
        size * (tokens if last is None else min(tokens, last))
        for size, last in zip(facts["kv_bytes_per_token"], reach, strict=True)
    ]
    return sum(kv if keep else state for keep, kv, state in zip(kept, caches, facts["state_bytes"], strict=True))


def speed_views(benches: Mapping[str, BenchReport]) -> list[View]:
    """Prefill, decoding, cache and peak memory against length, apart for each machine and batch; training steps."""
    views: list[View] = []
    for settings in union(_settings(report) for report in benches.values()):
        alike = {name: report for name, report in benches.items() if _settings(report) == settings}
        for title, unit, of in QUANTITIES:
            curves = {}
            for name, report in alike.items():
                teacher = "softmax" if len(alike) == 1 else f"{name}, softmax"
                for path, series in (("teacher", teacher), ("student", name)):
                    points = [(s.length, y) for s in report.speeds if s.path == path and (y := of(s)) is not None]
                    if points:
                        curves[series] = points
            if curves:
                axes: dict[str, Any] = {"x_label": "tokens of context", "y_label": unit, "log_x": True, "log_y": True}
                views.append(Lines(f"{title} ({settings})", series=curves, **axes))
    steps: list[Sequence[str | Number]] = [
        [name, s.stage, f"{s.batch} x {s.length:,}", s.teacher, s.student, s.peak_bytes and s.peak_bytes / MIB]
        for name, report in benches.items()
        for s in report.steps
    ]
    if steps:
        columns = ["model", "stage", "rows x tokens", "softmax tok/s", "student tok/s", "peak MiB"]
        views.append(Table("Training steps", columns=columns, rows=steps))
    short: list[Sequence[str | Number]] = [
        [n, s.path, s.length, s.error] for n, report in benches.items() for s in report.speeds if s.error
    ]
    if short:
        views.append(Table("Did not fit", columns=["model", "path", "tokens", "why"], rows=short))
    return views


QUANTITIES: tuple[tuple[str, str, Callable[[Speed], float | None]], ...] = (
    ("Prefill", "tokens per second", lambda speed: speed.prefill),
    ("Decoding", "tokens per second", lambda speed: speed.decode),
    ("Cache, measured", "MiB", lambda speed: speed.cache_bytes and speed.cache_bytes / MIB),
    ("Peak memory", "MiB", lambda speed: speed.peak_bytes and speed.peak_bytes / MIB),
)


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of as many consecutive ones."""
    size = math.ceil(len(points) / most) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _stage(folder: str) -> str:
    """0-attention_transfer -> Stage 1, attention_transfer."""
    number, _, name = folder.partition("-")
    return f"Stage {int(number) + 1}, {name}"


def _over_tokens(title: str, curves: Any, unit: str, *, log_y: bool, all_stages: bool = False) -> Lines:
    positive = all(y > 0 for points in curves.values() for _, y in points)
    axis = "training tokens, all stages" if all_stages else "training tokens of the stage"
    return Lines(title, x_label=axis, y_label=unit, series=curves, log_y=log_y and positive)


def _joined(stages: Sequence[StageLog], key: str) -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    before = 0.0
    for log in stages:
        points += [(before + tokens, value) for tokens, value in log.curve(key)]
        before += log.steps[-1]["tokens"]
    return points


def _layers(log: StageLog) -> list[int]:
    return sorted(int(key.removeprefix("layer_")) for key in log.logged() if key.removeprefix("layer_").isdecimal())


def _final(points: Sequence[tuple[float, float]]) -> Number:
    last = points[-max(1, len(points) // 10) :]
    return sum(y for _, y in last) / len(last)


def _course(stage: str, log: StageLog) -> HeatMap:
    layers = _layers(log)
    curves = [thinned(log.curve(f"layer_{i}"), COLUMNS) for i in layers]
    values = [[y / points[0][1] if points[0][1] else None for _, y in points] for points in curves]
    return HeatMap(
        f"{_stage(stage)}: share of the first loss that is left",
        "Of each layer, over the training; what is above 1 has the colour of 1.",
        x_label="training tokens (thousands)",
        y_label="layer",
        x=[f"{x / 1000:,.0f}" for x, _ in curves[0]],
        y=[str(i) for i in layers],
        values=values,
    )


def _settings(report: BenchReport) -> str:
    told = report.settings
    return f"batch {told.get('batch', '?')}, {told.get('dtype', '?')}, {told.get('device', '?')}"
