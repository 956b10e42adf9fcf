"""Reads what a report is made of: folders that `convert` wrote, and the JSON of `evaluate`, `bench` and `report`.

`read_sources(paths)` tells them apart by what they hold. A folder may also hold the JSON of `evaluate` and `bench`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linearize.bench import BenchReport
from linearize.errors import UserError
from linearize.evals.evaluate import Report
from linearize.evals.measure import Measurement
from linearize.hf.folder import is_of
from linearize.report.conversions import Conversion, read_conversion

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
    recipe: str | None = None
    """The resolved recipe, YAML."""
    scores: dict[str, float] = field(default_factory=dict)
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


def read_sources(paths: Sequence[str | Path]) -> Sources:
    """Read folders and JSON files.

    Raises:
        UserError: for a path that is none of them.
    """
    found = Sources()
    paths = list(dict.fromkeys(paths))
    folders = {Path(path): name for path, name in _names([Path(p) for p in paths if Path(p).is_dir()]).items()}
    for path in map(Path, paths):
        if path in folders:
            _read_folder(path, folders[path], found)
        elif path.is_file():
            _read_file(path, _read_json(path), None, found)
        else:
            raise UserError(f"{path} does not exist; give folders that `linearize convert` wrote, or JSON of reports")
    return found


def _names(folders: list[Path]) -> dict[Path, str]:
    """The last part of each path; where that is the same for two, as many parts as tell all apart."""
    whole = {folder: folder.resolve().parts for folder in folders}
    depth = 1
    while len({parts[-depth:] for parts in whole.values()}) < len(set(whole.values())):
        depth += 1
    return {folder: "/".join(parts[-depth:]) for folder, parts in whole.items()}


def _read_folder(folder: Path, name: str, found: Sources) -> None:
    conversion = read_conversion(folder)
    if conversion.name.endswith("(unfinished)"):
        name += " (unfinished)"
    name = _free(name, [model.name for model in found.models])
    run = folder / "run"
    stages = [
        StageLog(path.parent.name, steps)
        for path in sorted(run.glob("*/metrics.jsonl"), key=lambda path: int(path.parent.name.partition("-")[0]))
        if (steps := _read_lines(path))
    ]
    recipe, scores = run / "recipe.yaml", run / "layers.json"
    found.models.append(
        Source(
            Conversion(name, conversion.facts, conversion.points),
            stages,
            recipe.read_text() if recipe.is_file() else None,
            json.loads(scores.read_text())["rounds"][0]["scores"] if scores.is_file() else {},
        )
    )
    for path in sorted([*folder.glob("*.json"), *run.glob("*.json")]):
        if path.stat().st_size <= LARGEST_JSON and _kind(values := _read_json(path)) in ("evaluate", "bench"):
            own = _kind(values) == "bench" or is_of(values, folder)
            _read_file(path, values, name if own else None, found)


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


def _read_file(path: Path, values: Any, name: str | None, found: Sources) -> None:
    kind = _kind(values)
    if kind == "evaluate":
        report = Report.from_json(path)
        found.evaluations[_free(name or Path(report.model).name, found.evaluations)] = report
    elif kind == "bench":
        found.benches[_free(name or path.stem, found.benches)] = BenchReport.from_json(path)
    elif kind == "report":
        for value in values:
            points = {point: Measurement.from_dict(measured) for point, measured in value["points"].items()}
            facts = {key: fact for key, fact in value.items() if key not in ("name", "points")}
            taken = [model.name for model in found.models]
            found.models.append(Source(Conversion(_free(value["name"], taken), facts, points)))
    else:
        raise UserError(
            f"{path} is no JSON that `evaluate`, `bench` or `report` wrote with --output; give one of these, or a "
            "folder that `linearize convert` wrote"
        )


def _free(name: str, taken: Any) -> str:
    """`name`, numbered when it is taken."""
    numbered = (f"{name} {number}" if number > 1 else name for number in range(1, len(taken) + 2))
    return next(one for one in numbered if one not in taken)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); write it anew with --output") from error


def _read_lines(path: Path) -> list[dict[str, float]]:
    """A run that is still going on may have written half a line."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
