"""What evaluations were taken with: text, lengths, windows, questions, data type; and where two of them differ.

`of_report` and `of_conversion` give them as short texts by label, `table` shows those of several models, `differences`
names what makes numbers side by side incomparable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from linearize.evals.measure import Measurement
from linearize.evals.report import Report
from linearize.evals.table import NOTHING, union
from linearize.evals.views import Table
from linearize.report.conversions import Conversion

Conditions = dict[str, str]
"""Label -> value, both for readers; what is not known is left out."""
COMPARED: tuple[str, ...] = (
    "text",
    "split",
    "tokens of text",
    "windows a length",
    "questions a recall case",
    "questions a task",
)
COMPARED += ("examples in prompts", "dtype")
"""What has to be the same for numbers to be comparable; a length, batch size or device changes none of them."""
NAMED = 4
"""Models that a sentence names; of more it says how many."""


def of_report(report: Report) -> Conditions:
    """Of what `evaluate` measured."""
    environment = {key: report.environment.get(key) for key in ("dtype", "device")}
    return _conditions({**report.settings, **environment}, report.student)


def of_conversion(conversion: Conversion) -> Conditions:
    """Of the measurements between the stages; nothing where the recipe is not known."""
    told = conversion.evaluation
    return _conditions({**told, "dtype": conversion.facts["dtype"]}, conversion.last) if told else {}


def _conditions(told: Mapping[str, Any], taken: Measurement) -> Conditions:
    found: dict[str, Any] = {
        "text": told.get("text") or "the recipe's",
        "split": told.get("split"),
        "tokens of text": told.get("text_tokens"),
        "lengths": [point.length for point in taken.losses] or told.get("lengths"),
        "windows a length": told.get("windows"),
        "questions a recall case": told.get("recall_items") if taken.recall else None,
        "questions a task": (told.get("limit") or "all") if taken.tasks else None,
        "examples in prompts": ("the task's" if (n := told.get("num_fewshot")) is None else n) if taken.tasks else None,
        "dtype": str(told.get("dtype") or "").removeprefix("torch.") or None,
        "batch size": told.get("batch_size"),
        "device": told.get("device"),
    }
    return {key: shown for key, value in found.items() if value is not None and (shown := _shown(value))}


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def line(conditions: Conditions) -> str:
    """As one line of text."""
    return ", ".join(f"{label} {value.replace(', ', ' and ')}" for label, value in conditions.items())


def table(title: str, told: Mapping[str, Conditions], note: str = "") -> Table | None:
    """A row for all models of which the same is known; None where nothing is."""
    groups: list[tuple[list[str], Conditions]] = []
    for name, conditions in told.items():
        same = next((names for names, known in groups if known == conditions), None)
        if same is None:
            groups.append(([name], conditions))
        else:
            same.append(name)
    labels = union(label for _, conditions in groups for label in conditions)
    if not labels:
        return None
    most = max((names for names, _ in groups), key=len)
    rest = f"{'all' if len(groups) == 1 else 'the other'} {len(most)}"
    rows = [
        [
            rest if names is most and len(names) > NAMED else ", ".join(names),
            *(conditions.get(label, NOTHING) for label in labels),
        ]
        for names, conditions in groups
    ]
    return Table(title, note, columns=["", *labels], rows=rows)


def differences(told: Mapping[str, Conditions], measured: Mapping[str, Measurement]) -> list[str]:
    """A sentence for each condition that is not the same, and for tasks whose questions are not.

    Args:
        told: by model.
        measured: by model, in which teachers may stand too.
    """
    found = []
    for label in COMPARED:
        values = {name: conditions[label] for name, conditions in told.items() if label in conditions}
        found += _difference(label, values)
    for task in union(task for m in measured.values() for task in m.items):
        asked = {name: m.items[task] for name, m in measured.items() if task in m.items and m.items[task].documents}
        digests = {name: items.documents for name, items in asked.items()}
        numbers = union(digests.values())
        values = {n: f"set {numbers.index(digests[n]) + 1} of {len(i.right):,}" for n, i in asked.items()}
        found += _difference(f"questions of {task}", values)
    return found


def _difference(label: str, values: Mapping[str, str]) -> list[str]:
    if len(set(values.values())) < 2:
        return []
    groups = {value: [name for name, of in values.items() if of == value] for value in union(values.values())}
    return [f"{label}: " + "; ".join(f"{value} ({_names(names)})" for value, names in groups.items())]


def _names(names: Sequence[str]) -> str:
    return (
        ", ".join(names)
        if len(names) <= NAMED
        else f"{', '.join(names[: NAMED - 1])} and {len(names) - NAMED + 1} more"
    )
