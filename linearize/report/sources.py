"""Reads what a report is made of: folders that `convert` wrote, and the JSON of `evaluate`, `bench` and `report`.

`read_sources(paths)` tells them apart by what they hold. A folder may also hold the JSON of `evaluate` and `bench`.
What is damaged or foreign is left out of the report and named in `Sources.left_out`, whatever else there is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from linearize.bench import BenchReport
from linearize.errors import UserError
from linearize.evals.items import compare
from linearize.evals.measure import Measurement
from linearize.evals.report import Report
from linearize.hf.folder import is_of
from linearize.report.conversions import Conversion, read_conversion
from linearize.report.files import check_facts, checked, load, load_lines, what
from linearize.report.names import distinct, tails

LARGEST_JSON = 8 * 2**20
"""Bytes of a JSON file that is looked into when it lies in a folder; tokenizers can be larger."""


@dataclass(frozen=True)
class StageLog:
    """The metrics of one training stage."""

    name: str
    """Name of its folder, such as 0-attention_transfer."""
    steps: list[dict[str, float]]
    """A line for each logged step: loss, lr, tokens, tokens_per_second, layer_<i>, ..."""

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(tokens of this stage, value) for each step that has `key`."""
        return [(step["tokens"], step[key]) for step in self.steps if key in step]

    def logged(self) -> list[str]:
        """Names of everything that was logged."""
        return list(dict.fromkeys(key for step in self.steps for key in step))


@dataclass(frozen=True)
class Source:
    """One model of a report: a conversion with what its folder holds."""

    conversion: Conversion
    stages: list[StageLog] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    """What a selector found each layer to be worth, by layer number."""

    @property
    def name(self) -> str:
        """The same in all figures."""
        return self.conversion.name


@dataclass
class Sources:
    """Everything that one report is made of; names are distinct."""

    models: list[Source] = field(default_factory=list)
    evaluations: dict[str, Report] = field(default_factory=dict)
    benches: dict[str, BenchReport] = field(default_factory=dict)
    """Name of the model, or of the file where a report does not say -> speed and memory."""
    left_out: list[str] = field(default_factory=list)
    """Which files are not shown, and why."""


@dataclass
class _Found:
    """What was read so far, with the files it came from."""

    models: list[tuple[str, Path | None, Source]] = field(default_factory=list)
    """Name, file where it is one, and what it holds."""
    evaluations: list[tuple[str, Path | None, Report]] = field(default_factory=list)
    benches: list[tuple[str, Path | None, BenchReport]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    files: set[Path] = field(default_factory=set)
    """Read, or tried."""

    @contextmanager
    def sparing(self) -> Iterator[None]:
        """What is wrong with a file becomes a line of `left_out`."""
        try:
            yield
        except UserError as error:
            self.left_out.append(str(error))


@dataclass(frozen=True)
class _Round:
    scores: dict[int, float]


@dataclass(frozen=True)
class _Scores:
    """`run/layers.json`, as far as it is shown."""

    rounds: list[_Round]


@dataclass(frozen=True)
class _Converted:
    """A conversion in what `report` wrote, less its facts."""

    name: str
    points: dict[str, Measurement]
    evaluation: dict[str, Any] | None = None
    recipe: str | None = None


def read_sources(paths: Sequence[str | Path]) -> Sources:
    """Read folders and JSON files.

    Raises:
        UserError: for a path that does not exist, and where none of them holds anything to show.
    """
    named: dict[Path, Path] = {}
    for path in map(Path, paths):
        named.setdefault(path.resolve(), path)
    unique = list(named.values())
    for path in unique:
        if not path.exists():
            raise UserError(f"{path} does not exist; give folders that `linearize convert` wrote, or JSON of reports")
    found = _Found()
    names = tails([path for path in unique if path.is_dir()])
    others: list[Path] = []
    for path in unique:
        if path not in names and path.suffix != ".json" and not _is_json(path):
            others.append(path)
            continue
        with found.sparing():
            if path in names:
                _read_folder(path, names[path], found)
            elif path.resolve() not in found.files:
                _read_file(path, load(path), None, found)
    if others:
        told = ", ".join(map(str, others[:3])) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        is_ = "is neither a folder nor" if len(others) == 1 else "are neither folders nor"
        found.left_out.append(f"{told} {is_} JSON; give folders that `linearize convert` wrote, or JSON of reports")
    if not (found.models or found.evaluations or found.benches):
        raise UserError("\n".join(found.left_out))
    models = zip(_named(found.models), (source for *_, source in found.models), strict=True)
    return Sources(
        [replace(source, conversion=replace(source.conversion, name=name)) for name, source in models],
        dict(zip(_named(found.evaluations), (report for *_, report in found.evaluations), strict=True)),
        dict(zip(_named(found.benches), (report for *_, report in found.benches), strict=True)),
        found.left_out,
    )


def _is_json(path: Path) -> bool:
    try:
        load(path)
    except UserError:
        return False
    return True


def _named(items: Sequence[tuple[str, Path | None, Any]]) -> list[str]:
    return distinct([(name, path) for name, path, _ in items])


def _read_folder(folder: Path, name: str, found: _Found) -> None:
    conversion = read_conversion(folder)
    found.left_out += conversion.left_out
    if conversion.name.endswith("(unfinished)"):
        name += " (unfinished)"
    run = folder / "run"
    scores: dict[int, float] = {}
    if (run / "layers.json").is_file():
        with found.sparing():
            rounds = checked(load(run / "layers.json"), _Scores, run / "layers.json").rounds
            scores = rounds[0].scores if rounds else {}
    found.models.append((name, None, Source(conversion, _read_stages(run, found), scores)))
    for path in sorted(path for place in (folder, run) for path in place.glob("*.json")):
        if not path.is_file() or path.stat().st_size > LARGEST_JSON or path.resolve() in found.files:
            continue
        if path.parent == run and path.name in ("plan.json", "measurements.json", "layers.json"):
            continue
        with found.sparing():
            if _kind(values := load(path)) in ("evaluate", "bench"):
                own = _kind(values) == "bench" or is_of(values, folder)
                _read_file(path, values, name if own else None, found)


def _read_stages(run: Path, found: _Found) -> list[StageLog]:
    numbered: list[tuple[int, StageLog]] = []
    for path in sorted(run.glob("*/metrics.jsonl")):
        stage = re.fullmatch(r"(\d+)-.+", path.parent.name)
        with found.sparing():
            if stage is None:
                raise UserError(f"{path} is of no stage, whose folder has a name such as 0-finetune")
            numbered.append((int(stage[1]), StageLog(path.parent.name, _read_steps(path, found))))
    return [log for _, log in sorted(numbered, key=lambda pair: pair[0]) if log.steps]


def _read_steps(path: Path, found: _Found) -> list[dict[str, float]]:
    """The logged numbers of each step; none of a stage that has just begun."""
    values, broken = load_lines(path)
    dicts = [step for step in values if isinstance(step, dict)]
    steps = [{key: x for key, x in step.items() if _is_number(x)} for step in dicts]
    fitting = [step for step in steps if "tokens" in step]
    broken += len(values) - len(fitting)
    if broken and not fitting:
        raise UserError(f"{path} is no log of a stage: none of its lines says how many tokens it is of")
    if broken:
        found.left_out.append(f"{path}: {broken} of its lines are damaged")
    if endless := sum(any(isinstance(x, float) and not math.isfinite(x) for x in step.values()) for step in dicts):
        found.left_out.append(f"{path}: {endless} of its {len(fitting)} steps have numbers that are not finite")
    return fitting


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(values: Any) -> str | None:
    """The command that wrote it."""
    if isinstance(values, dict):
        if {"student", "teacher", "environment"} <= values.keys():
            return "evaluate"
        return "bench" if {"speeds", "steps", "memory"} <= values.keys() else None
    if (
        isinstance(values, list)
        and values
        and all(isinstance(v, dict) and {"points", "layers"} <= v.keys() for v in values)
    ):
        return "report"
    return None


def _read_file(path: Path, values: Any, name: str | None, found: _Found) -> None:
    found.files.add(path.resolve())
    kind = _kind(values)
    if kind == "evaluate":
        report = checked(values, Report, path)
        try:
            compare(report.student, report.teacher or Measurement())
        except ValueError as error:
            raise UserError(f"{path} is damaged: its answers do not belong together ({error})") from error
        found.evaluations.append((name or Path(report.model).name, path, report))
    elif kind == "bench":
        bench = checked(values, BenchReport, path)
        lengths = {path: {s.length for s in bench.speeds if s.path == path} for path in ("teacher", "student")}
        if lengths["teacher"] != lengths["student"]:
            raise UserError(f"{path} is damaged: it has not the same lengths of teacher and student")
        found.benches.append((name or path.stem, path, bench))
    elif kind == "report":
        for number, value in enumerate(values):
            with found.sparing():
                found.models.append(_converted(value, path, number))
    else:
        raise UserError(_foreign(path, values))


def _converted(value: dict[str, Any], path: Path, number: int) -> tuple[str, Path, Source]:
    where = f"{path}, conversion {number}"
    known = checked(value, _Converted, where)
    facts = {key: x for key, x in value.items() if key not in ("name", "points", "evaluation", "recipe")}
    conversion = Conversion(known.name, check_facts(facts, where), known.points, known.evaluation or {}, known.recipe)
    return known.name, path, Source(conversion)


def _foreign(path: Path, values: Any) -> str:
    """What to do with a JSON that a report is not made of."""
    for folder in path.resolve().parents[:2]:
        if (folder / "run" / "plan.json").is_file():
            return f"{path} is a part of a conversion; give its folder, {folder}, instead"
    told = f"{path} is no JSON that `evaluate`, `bench` or `report` wrote with --output: it holds {what(values)}"
    if isinstance(values, dict) and {"results", "configs"} <= values.keys():
        return (
            f"{told}, as the lm-evaluation-harness writes; `linearize evaluate MODEL --tasks NAMES --output FILE` asks "
            "its tasks and writes what a report can show"
        )
    return f"{told}; give one of these, or a folder that `linearize convert` wrote"
