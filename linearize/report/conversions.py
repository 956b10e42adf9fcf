"""Puts several conversions side by side: what each mixer added, what it keeps per layer, and its loss from step to
step.

`report(folders)` reads what `convert` left in each folder's `run`; nothing is measured again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linearize.architecture import architecture
from linearize.errors import UserError, check_target, write_whole
from linearize.evals.measure import Measurement
from linearize.evals.table import NOTHING, case_name, grid, number, percent, union
from linearize.hf.folder import read_mapping
from linearize.model_names import resolve_model
from linearize.report.files import check_facts, checked, load, read_text


@dataclass(frozen=True)
class Conversion:
    """What one conversion left behind."""

    name: str
    """Name of its folder."""
    facts: dict[str, Any]
    """`run/plan.json`: see `facts_of`."""
    points: dict[str, Measurement]
    """Measurements by the point at which they were taken, in order."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """What they were taken with: the recipe's `evaluation`, with the text that it leaves to `data`."""
    recipe: str | None = None
    """The resolved recipe, YAML."""
    left_out: list[str] = field(default_factory=list)
    """Which files of the folder are not shown, and why."""

    @property
    def last(self) -> Measurement:
        """The newest measurement that is not the teacher's; an empty one before there is any."""
        students = [m for name, m in self.points.items() if name != "teacher"]
        return students[-1] if students else Measurement()


def read_conversion(folder: str | Path) -> Conversion:
    """Read what `convert` left in `folder/run`, of a finished or a running conversion.

    Raises:
        UserError: for a folder without a plan, or with a damaged one; what else is missing or damaged is left out.
    """
    folder, run = Path(folder), Path(folder) / "run"
    if not (run / "plan.json").is_file():
        raise UserError(f"{folder} has no run/plan.json; give folders that `linearize convert` wrote")
    facts = check_facts(load(run / "plan.json"), run / "plan.json")
    left_out: list[str] = []
    points: list[tuple[str, Measurement]] = []
    try:
        points = _read_points(run / "measurements.json")
    except UserError as error:
        left_out.append(str(error))
    recipe, evaluation = None, {}
    if (run / "recipe.yaml").is_file():
        try:
            recipe = read_text(run / "recipe.yaml")
            evaluation = _evaluation(read_mapping(run / "recipe.yaml"))
        except UserError as error:
            left_out.append(str(error))
    name = folder.resolve().name
    name = name if (folder / "config.json").is_file() else f"{name} (unfinished)"
    return Conversion(name, facts, dict(points), evaluation, recipe, left_out)


def _read_points(path: Path) -> list[tuple[str, Measurement]]:
    if not path.is_file():
        raise UserError(f"{path} is missing: nothing was measured")
    points = checked(load(path), list[tuple[str, Measurement]], path)
    if not points:
        raise UserError(f"{path} is empty: nothing was measured yet")
    return points


def _evaluation(recipe: dict[str, Any]) -> dict[str, Any]:
    told, data = recipe.get("evaluation"), recipe.get("data")
    if not isinstance(told, dict):
        return {}
    source = data.get("source") if isinstance(data, dict) else None
    return {**told, "text": told.get("text") or source}


def report(folders: Sequence[str | Path]) -> str:
    """A Markdown table with a row per conversion, sorted as given.

    Columns: parameters added, bytes of state per swapped layer, the loss after each step at the shortest length that
    all were measured at, its gap to the teacher at the end at every length, KL(teacher || student) per token, the gap
    with the linear branch off, and recall at the end. Below: what mixers with other parts are, and the teachers.
    """
    return report_of([read_conversion(folder) for folder in folders])


def report_of(found: Sequence[Conversion]) -> str:
    """As `report`, of what was read already."""
    steps = union(name for c in found for name in c.points if name != "teacher")
    steps.sort(key=lambda name: max(list(c.points).index(name) for c in found if name in c.points))
    lengths = sorted(union(point.length for c in found for m in c.points.values() for point in m.losses))
    cases = sorted(union((score.facts, score.distance) for c in found for m in c.points.values() for score in m.recall))
    shared = [n for n in lengths if all(c.last.loss(n) is not None for c in found)]
    first = next(iter([*shared, *lengths]), 0)
    header = ["", "mixer", "layers", "new parameters", "state KiB/layer"]
    header += [f"loss {first} {step}" for step in steps]
    diverging = sorted(union(point.length for c in found for m in c.points.values() for point in m.divergence))
    header += [f"gap {length}" for length in lengths] + [f"KL {length}" for length in diverging]
    header += [f"gap {length}, linear off" for length in lengths]
    header += [f"recall {case_name(case)}" for case in cases] + ["tokens"]
    rows = [_row(c, steps, first, lengths, diverging, cases) for c in found]
    return grid(header, rows) + _renamed(found) + _teachers(found, lengths, cases)


def to_json(folders: Sequence[str | Path], path: str | Path) -> None:
    """Write everything the table was made of."""
    write_json([read_conversion(folder) for folder in folders], path)


def write_json(found: Sequence[Conversion], path: str | Path) -> None:
    """As `to_json`, of what was read already."""
    data = [
        {
            "name": c.name,
            **c.facts,
            "points": {name: m.to_dict() for name, m in c.points.items()},
            "evaluation": c.evaluation,
            "recipe": c.recipe,
        }
        for c in found
    ]
    check_target(path)
    if Path(path).is_file() and not _is_ours(Path(path)):
        raise UserError(f"{path} is there already and holds something else; give another name")
    write_whole(path, json.dumps(data, indent=1) + "\n")


def _is_ours(path: Path) -> bool:
    """Whether a file is what `write_json` wrote."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(values, list) and all(isinstance(v, dict) and {"name", "points"} <= v.keys() for v in values)


def _row(
    c: Conversion,
    steps: list[str],
    first: int,
    lengths: list[int],
    diverging: list[int],
    cases: list[tuple[int, int]],
) -> list[str]:
    teacher, last = c.points.get("teacher"), c.last
    states = [size for size in c.facts["state_bytes"] if size]
    row = [c.name, c.facts["mixer"], c.facts["layers"], f"{c.facts['new_parameters']:,}"]
    row += [f"{sum(states) / len(states) / 1024:,.1f}" if states else NOTHING]
    row += [number(c.points[step].loss(first)) if step in c.points else NOTHING for step in steps]

    def gap(loss: float | None, length: int) -> str:
        base = None if teacher is None else teacher.loss(length)
        return NOTHING if loss is None or base is None else number(loss - base, sign="+")

    row += [gap(last.loss(length), length) for length in lengths]
    row += [number(None if (found := last.diverges(length)) is None else found.kl) for length in diverging]
    row += [gap(last.branch_loss("linear", length), length) for length in lengths]
    tokens = f"{last.tokens:,}" if c.points else NOTHING  # which is known from measurements
    return [*row, *(percent(last.recall_rate(*case)) for case in cases), tokens]


def _renamed(found: Sequence[Conversion]) -> str:
    """A line per conversion whose mixer has other parts than it ships with."""
    lines = [f"Mixer of {c.name}: {mixer_name(c.facts)}" for c in found if mixer_name(c.facts) != c.facts["mixer"]]
    return "".join(f"\n\n{line}" for line in lines)


def _teachers(found: Sequence[Conversion], lengths: list[int], cases: list[tuple[int, int]]) -> str:
    """A line per distinct teacher."""
    lines = []
    for c in found:
        teacher = c.points.get("teacher")
        if teacher is None:
            continue
        told = [f"loss {n} {number(teacher.loss(n))}" for n in lengths if teacher.loss(n) is not None]
        asked = [case for case in cases if teacher.recall_rate(*case) is not None]
        told += [f"recall {case_name(case)} {percent(teacher.recall_rate(*case))}" for case in asked]
        lines.append(f"Teacher {c.facts['source']}: {', '.join(told)}")
    return "\n\n" + "\n\n".join(union(lines)) if lines else ""


def mixer_name(facts: Mapping[str, Any]) -> str:
    """What the mixer of a conversion is; older ones tell its key alone."""
    return facts.get("architecture") or facts["mixer"]


def facts_of(plan: Any) -> dict[str, Any]:
    """What a report says of a `linearize.plan.Plan`, as plain data."""
    return {
        "source": "demo" if plan.source == resolve_model("demo") else Path(plan.source).name,
        "family": plan.family,
        "mixer": plan.mixer["type"],
        "architecture": architecture(plan.mixer),
        "settings": plan.mixer,
        "layers": "".join("S" if layer.mixer is None else "L" for layer in plan.layers),
        "new_parameters": plan.new_parameters,
        "source_parameters": plan.source_parameters,
        "state_bytes": [layer.state_bytes for layer in plan.layers],
        "kv_bytes_per_token": [layer.kv_bytes_per_token for layer in plan.layers],
        "reach": [layer.reach for layer in plan.layers],
        "causal": plan.causal,
        "dtype": plan.dtype,
        "tensors": [dataclasses.asdict(t) for t in next((x.new for x in plan.layers if x.mixer is not None), ())],
    }
