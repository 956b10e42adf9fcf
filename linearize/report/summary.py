"""The tables of a report's page, as views: the summary, the points of a conversion, tasks and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from linearize.evals.measure import Measurement
from linearize.evals.table import NOTHING, case_name, percent, shown_prompt, union
from linearize.evals.views import Table
from linearize.report.conversion_views import cache_bytes
from linearize.report.conversions import mixer_name
from linearize.report.numerals import short
from linearize.report.sources import Source

Cell = str | float | None
LONG = 131072
"""Tokens at which the summary compares caches."""


def summary_table(models: Sequence[Source]) -> Table:
    """A row per teacher and model: what was kept, what it cost, what is left of the teacher."""
    last = {model.name: model.conversion.last for model in models}
    lengths = sorted(union(loss.length for m in last.values() for loss in m.losses))
    cases = sorted(union((score.facts, score.distance) for m in last.values() for score in m.recall))
    diverging = sorted(union(d.length for m in last.values() for d in m.divergence))
    columns = ["", "source", "mixer", "softmax kept", "new parameters", "tokens trained"]
    columns += [f"{what} {n:,}" for n in lengths for what in ("loss", "gap")] + [f"KL {n:,}" for n in diverging]
    columns += [f"recall {case_name(case)}" for case in cases] + ["cache of 131,072 tokens (of softmax's)"]
    rows: list[Sequence[Cell]] = []
    for model in models:
        facts, m, teacher = model.conversion.facts, last[model.name], model.conversion.points.get("teacher")
        loss = [cell for n in lengths for cell in (_fixed(m.loss(n)), gap(m, teacher, n))]
        apart = [_fixed(None if (d := m.diverges(n)) is None else d.kl) for n in diverging]
        known = [percent(m.recall_rate(*case)) for case in cases]
        kept = f"{facts['layers'].count('S')} of {len(facts['layers'])}"
        first = [model.name, facts["source"], mixer_name(facts), kept]
        counts = [f"{facts['new_parameters']:,}", f"{m.tokens:,}"]
        rows.append([*first, *counts, *loss, *apart, *known, _cache(model)])
    teachers: list[Sequence[Cell]] = []
    for name, (source, m) in teachers_of(models).items():
        loss = [cell for n in lengths for cell in (_fixed(m.loss(n)), NOTHING)]
        known = [percent(m.recall_rate(*case)) for case in cases]
        apart = [NOTHING for _ in diverging]
        teachers.append([name, source, "softmax", "all", NOTHING, NOTHING, *loss, *apart, *known, NOTHING])
    note = "Losses and KL(teacher || student) in nats per token; gap: loss above the teacher's. "
    note += "Recall: facts / tokens between them and the question."
    return Table("Summary", note, columns=columns, rows=[*teachers, *rows])


def teachers_of(models: Sequence[Source]) -> dict[str, tuple[str, Measurement]]:
    """(source model, measurement) of each teacher that was measured, once for all models that share it."""
    teachers: dict[str, tuple[str, str, Measurement]] = {}
    for model in models:
        if (teacher := model.conversion.points.get("teacher")) is not None:
            source = model.conversion.facts["source"]
            losses = [(loss.length, round(loss.loss, 2)) for loss in teacher.losses]
            teachers.setdefault(f"{source} {losses}", (model.name, source, teacher))
    alone = len(teachers) == 1
    return {"teacher" if alone else f"teacher of {name}": (source, m) for name, source, m in teachers.values()}


def tiles(model: Source) -> list[tuple[str, str]]:
    """The numbers that matter first, of one model: (value, what it is)."""
    facts, last, teacher = model.conversion.facts, model.conversion.last, model.conversion.points.get("teacher")
    found = [
        (f"{facts['layers'].count('S')} of {len(facts['layers'])}", "layers kept softmax"),
        (f"{facts['new_parameters'] / 1e6:,.3g}M", f"new parameters, of {facts['source_parameters'] / 1e6:,.4g}M"),
        (short(last.tokens, 4), "tokens trained"),
    ]
    for point in last.losses[:1]:
        found.append((gap(last, teacher, point.length), f"nats per token above the teacher, {point.length:,} tokens"))
    found += [(_fixed(d.kl), f"KL(teacher || student), {d.length:,} tokens") for d in last.divergence[:1]]
    for score in last.recall:
        base = teacher.recall_rate(score.facts, score.distance) if teacher else None
        what = f"recall of {case_name((score.facts, score.distance))} tokens"
        found.append((percent(score.exact_match), what + (f"; teacher {percent(base)}" if base is not None else "")))
    if (saved := _cache(model)) != NOTHING:
        found.append(
            (saved.partition(" (")[0], saved.partition(" (")[2].rstrip(")") + f" of softmax, cache of {LONG:,} tokens")
        )
    return found


def points_table(model: Source) -> Table:
    """A row per point of the conversion: teacher, untrained, after each stage."""
    points = model.conversion.points
    teacher = points.get("teacher")
    lengths = union(loss.length for m in points.values() for loss in m.losses)
    branches = union((b.branch, b.length) for m in points.values() for b in m.branches)
    cases = union((score.facts, score.distance) for m in points.values() for score in m.recall)
    diverging = union(d.length for m in points.values() for d in m.divergence)
    agreeing = union(a.length for m in points.values() for a in m.agreement)
    columns = ["", *(f"{what} {n:,}" for n in lengths for what in ("loss", "gap")), *(f"KL {n:,}" for n in diverging)]
    columns += [f"embeddings agree {n:,}" for n in agreeing]
    columns += [f"loss {n:,}, {branch} off" for branch, n in branches] + [case_name(case) for case in cases]
    rows: list[Sequence[Cell]] = []
    for name, m in points.items():
        row: list[Cell] = [name]
        for n in lengths:
            row += [_fixed(m.loss(n)), NOTHING if name == "teacher" else gap(m, teacher, n)]
        row += [_fixed(None if (d := m.diverges(n)) is None else d.kl) for n in diverging]
        row += [_fixed(None if (a := m.agrees(n)) is None else a.embedding) for n in agreeing]
        row += [_fixed(m.branch_loss(*branch)) for branch in branches]
        row += [percent(m.recall_rate(*case)) for case in cases]
        rows.append([*row, f"{m.tokens:,}", f"{m.seconds:,.0f}"])
    return Table(model.name, columns=[*columns, "tokens so far", "training s"], rows=rows)


def tasks_table(measurements: Mapping[str, Measurement]) -> Table | None:
    """Tasks of the lm-evaluation-harness: a row per metric, a column per model; None where none was run."""
    told = union((task, metric) for m in measurements.values() for task in m.tasks for metric in m.main_metrics(task))
    if not told:
        return None

    def cell(m: Measurement, task: str, metric: str) -> str:
        error = m.tasks.get(task, {}).get(f"{metric}_stderr")
        value = _fixed(m.tasks.get(task, {}).get(metric))
        return value if not isinstance(error, float) else f"{value} ± {error:.3f}"

    def asked(task: str) -> str:
        numbers = [
            sum(len(m.items[t].right) for t in m.groups.get(task, [task]) if t in m.items)
            for m in measurements.values()
        ]
        return ", ".join(f"{n:,}" for n in union(filter(None, numbers))) or NOTHING

    shown = [name for name, m in measurements.items() if m.tasks]
    rows = [
        [task, metric, asked(task), *(cell(measurements[name], task, metric) for name in shown)]
        for task, metric in told
    ]
    note = "Of the lm-evaluation-harness, with standard errors. Questions: those that are right or wrong."
    return Table("Tasks", note, columns=["task", "metric", "questions", *shown], rows=rows)


def samples_tables(measurements: Mapping[str, Measurement]) -> list[Table]:
    """What each model wrote, a table for each prompt."""
    written = {name: m for name, m in measurements.items() if m.sample is not None}
    prompts = union(m.prompt for m in written.values())
    return [
        Table(
            "Samples",
            f"Written greedily after: {shown_prompt(prompt or '')}",
            columns=["", "continuation"],
            rows=[[name, m.sample] for name, m in written.items() if m.prompt == prompt],
        )
        for prompt in prompts
    ]


def gap(m: Measurement, teacher: Measurement | None, length: int) -> str:
    """Loss above the teacher's at `length`, signed."""
    loss, base = m.loss(length), None if teacher is None else teacher.loss(length)
    return NOTHING if loss is None or base is None else f"{loss - base:+.3f}"


def _cache(model: Source) -> str:
    """MiB of the longest cache, and its share of the source's."""
    facts = model.conversion.facts
    before = cache_bytes(facts, LONG, converted=False)
    if not facts.get("causal", True) or not before:
        return NOTHING
    after = cache_bytes(facts, LONG)
    return f"{after / 2**20:,.1f} MiB ({after / before:.1%})"


def _fixed(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"
