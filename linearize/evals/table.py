"""Plain-text tables of measurements; they are valid Markdown too, so that a model card can show them.

`comparison_table` has one row per point of a conversion (teacher, untrained, after each stage),
`side_by_side` one row per metric with teacher, student and their difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from linearize.evals.items import HEADER, compare, comparison_rows
from linearize.evals.measure import Measurement

NOTHING = "–"
PROMPT = 160
"""Characters of a prompt that are shown at most: a sentence or two, the last ones."""


def comparison_table(points: Sequence[tuple[str, Measurement]]) -> str:
    """One table with a row per (name, measurement), then the samples they generated.

    Columns: loss at each length, its gap to the point called "teacher" if there is one, the loss with each
    branch off, the recall cases, trained tokens and seconds so far.
    """
    teacher = dict(points).get("teacher")
    lengths = union(point.length for _, m in points for point in m.losses)
    branches = union((loss.branch, loss.length) for _, m in points for loss in m.branches)
    cases = union((score.facts, score.distance) for _, m in points for score in m.recall)
    tasks = union((task, metric) for _, m in points for task in m.tasks for metric in m.main_metrics(task))
    agreements = union(found.length for _, m in points for found in m.agreement)
    header = ["", *(name for length in lengths for name in (f"loss {length}", "gap"))]
    header += [name for length in agreements for name in (f"embeddings agree {length}", f"tokens agree {length}")]
    diverging = union(found.length for _, m in points for found in m.divergence)
    header += [f"KL {length}" for length in diverging]
    header += [f"loss {length}, {branch} off" for branch, length in branches]
    header += [case_name(case) for case in cases] + [f"{task} {metric}" for task, metric in tasks]
    header += ["tokens so far", "training s"]
    rows = []
    for name, m in points:
        row = [name]
        for length in lengths:
            gap = None if teacher is None or m is teacher else _minus(m.loss(length), teacher.loss(length))
            row += [number(m.loss(length)), number(gap, sign="+")]
        for length in agreements:
            found = m.agrees(length)
            row += [number(value) for value in ((None, None) if found is None else (found.embedding, found.token))]
        row += [number(None if (apart := m.diverges(length)) is None else apart.kl) for length in diverging]
        row += [number(m.branch_loss(branch, length)) for branch, length in branches]
        row += [percent(m.recall_rate(*case)) for case in cases]
        row += [number(m.tasks.get(task, {}).get(metric)) for task, metric in tasks]
        rows.append([*row, f"{m.tokens:,}", f"{m.seconds:,.0f}"])
    return grid(header, rows) + _samples(points) + _notes(points)


def side_by_side(student: Measurement, teacher: Measurement | None) -> str:
    """One row per metric, columns teacher, student, difference; the rows with a branch off come last.

    A second table compares the answers to each question of tasks: see `linearize.evals.items`.
    """
    columns = [m for m in (teacher, student) if m is not None]
    header = ["", "teacher", "student", "difference"] if teacher else ["", "model"]

    def row(name: str, values: list[float | None], show: Callable[..., str] = number) -> list[str]:
        cells = [name, *(show(value) for value in values)]
        return [*cells, show(_minus(values[1], values[0]), sign="+")] if teacher else cells

    rows = [
        row(f"loss {length}", [m.loss(length) for m in columns]) for length in union(p.length for p in student.losses)
    ]
    nothing: list[float | None] = [None] * (len(columns) - 1)
    for distance in student.divergence:
        rows.append(row(f"KL to the teacher {distance.length}", [*nothing, distance.kl]))
    for found in student.agreement:
        rows.append(row(f"embeddings agree {found.length}", [*nothing, found.embedding]))
        rows.append(row(f"tokens agree {found.length}", [*nothing, found.token]))
    for point in student.losses:
        for first, end, _ in point.by_position:
            values = [m.position_loss(point.length, first, end) for m in columns]
            rows.append(row(f"loss {point.length}, positions {first}-{end - 1}", values))
    for score in student.recall:
        case = (score.facts, score.distance)
        rows.append(row(f"recall {case_name(case)}", [m.recall_rate(*case) for m in columns], percent))
    for task in student.tasks:
        for metric in student.main_metrics(task):
            rows.append(row(f"{task} {metric}", [m.tasks.get(task, {}).get(metric) for m in columns]))
    for loss in student.branches:
        rows.append(row(f"loss {loss.length}, {loss.branch} off", [*nothing, loss.loss]))
        rise = _minus(loss.loss, student.loss(loss.length))
        rows.append(row(f"loss {loss.length}, rise by {loss.branch} off", [*nothing, rise]))
    points = [("teacher", teacher), ("student", student)] if teacher else [("model", student)]
    named = [(name, m) for name, m in points if m is not None]
    compared = compare(student, teacher) if teacher else {}
    answers = "\n\n" + grid(HEADER, comparison_rows(compared)) if compared else ""
    return grid(header, rows) + answers + _samples(named) + _notes(named)


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    widths = [max(3, *(len(line[i]) for line in (header, *rows))) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(cells))
        return f"| {' | '.join([first, *others])} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *(line(row) for row in rows)])


def _samples(points: Sequence[tuple[str, Measurement]]) -> str:
    """Indented, which to Markdown is text as it stands: lines stay apart, and a model may write any signs."""
    told = [(name, m) for name, m in points if m.sample is not None]
    if not told:
        return ""
    width = max(len(name) for name, _ in told)
    lines = [f"Continuations of {shown_prompt(told[0][1].prompt or '')!r}:"]
    lines += [f"{name:<{width}}  {' '.join((m.sample or '').split())}" for name, m in told]
    return "\n\n" + "\n".join(f"    {line}" for line in lines)


def shown_prompt(prompt: str) -> str:
    """The end of a prompt, in whole words, which is what was continued."""
    if len(prompt) <= PROMPT:
        return prompt
    end = prompt[-PROMPT:]
    return f"… {end if prompt[-PROMPT - 1].isspace() else end.partition(' ')[2] or end}"


def _notes(points: Sequence[tuple[str, Measurement]]) -> str:
    return "".join(f"\n\nNote: {note}" for note in noted({name: m.notes for name, m in points}))


def noted(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """Each note once, behind the names of those that it is about where these are not all.

    Args:
        notes: by name.
    """
    found = []
    for note in union(note for told in notes.values() for note in told):
        names = [name for name, told in notes.items() if note in told]
        found.append(note if len(names) == len(notes) else f"{', '.join(names)}: {note}")
    return found


def case_name(case: tuple[int, int]) -> str:
    facts, distance = case
    return f"{facts} fact{'s' if facts > 1 else ''}/{distance}"


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def number(value: float | None, sign: str = "") -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{round(value, 3) + 0.0:{sign}.3f}"  # + 0.0: no minus before a zero


def percent(value: float | None, sign: str = "") -> str:
    return NOTHING if value is None else f"{value:{sign}.0%}"


def union(values: object) -> list:
    """Distinct values in order of appearance."""
    return list(dict.fromkeys(values))  # type: ignore[call-overload]
