"""Writes the report: one HTML page that loads nothing from elsewhere, and its figures as PNG files beside it.

`write_page(["runs/gdn", "runs/lolcats"], "report.html")` writes `report.html` and `report/*.png`. Nothing is measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from linearize import __version__
from linearize.errors import UserError, check_target, disk_full
from linearize.evals.items import HEADER, compare, comparison_rows
from linearize.evals.measure import Measurement
from linearize.evals.probe_views import probe_views
from linearize.evals.standard_views import standard_views
from linearize.evals.table import noted, union
from linearize.evals.views import Table, View
from linearize.report import conditions, html
from linearize.report.conversion_views import cache_views, layer_views, schedule_views, speed_views, training_views
from linearize.report.conversions import mixer_name
from linearize.report.figures import Style
from linearize.report.gallery import MANY, Gallery
from linearize.report.sources import Source, Sources, read_sources
from linearize.report.summary import points_table, samples_tables, summary_table, tasks_table, teachers_of, tiles


def write_page(
    sources: Sources | Sequence[str | Path], page: str | Path, *, trust_remote_code: bool = False
) -> tuple[Path, list[Path]]:
    """Write the report of folders and JSON files.

    Args:
        sources: folders that `convert` wrote, and JSON that `evaluate`, `bench` or `report` wrote; or what was read.
        page: the HTML file; the pictures go into a folder beside it, of its name without suffix.
        trust_remote_code: import probes of your own that measurements name as `module:Class`.

    Returns:
        The page, and the pictures.

    Raises:
        UserError: for paths that hold nothing to report, or a page that cannot be written.
    """
    page = check_page(page)
    folder = page.with_suffix("")
    sources = sources if isinstance(sources, Sources) else read_sources(sources)
    text, pictures = render(sources, trust_remote_code=trust_remote_code)
    try:
        with disk_full(page.parent):
            folder.mkdir(parents=True, exist_ok=True)
            page.write_text(text, encoding="utf-8")
            for name, data in pictures.items():
                (folder / name).write_bytes(data)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"cannot write {page} and {folder}: {error}; give another place with --html FILE") from error
    return page, [folder / name for name in pictures]


def check_page(page: str | Path) -> Path:
    """The name of a page, beside which there is room for its pictures.

    Raises:
        UserError: for one that cannot be written.
    """
    page = Path(page)
    if page.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{page} is no name of a page; give one that ends with .html")
    check_target(page)
    folder = page.with_suffix("")
    if folder.is_dir() and any(path.suffix != ".png" for path in folder.iterdir()):
        raise UserError(
            f"cannot write the pictures of {page} into {folder}, which holds other things; name the page otherwise, "
            "such as report.html"
        )
    return page


def render(sources: Sources, *, trust_remote_code: bool = False) -> tuple[str, dict[str, bytes]]:
    """The page, and its pictures by file name."""
    runs = measured(sources.models)
    reports = evaluated(sources)
    named = [m.name for m in sources.models]
    names = union([*named, *sources.evaluations, *sources.benches])
    teachers = [*(name for name in union([*runs, *reports]) if name not in names), "softmax"]
    gallery = Gallery(Style(names, teachers))
    models = sources.models
    trained = {m.name: conditions.of_conversion(m.conversion) for m in models}
    taken = {name: conditions.of_report(report) for name, report in sources.evaluations.items()}
    asked = _quality(reports, gallery, "evaluation", trust_remote_code) + gallery.show(_answers(sources))
    sections = [
        ("Summary", _summary(models)),
        ("Quality", _conditions(trained, runs) + _quality(runs, gallery, "", trust_remote_code) + _points(models)),
        ("Evaluation", _conditions(taken, reports) + asked + _settings(sources)),
        ("Training", gallery.show(training_views(models)) + _more(gallery.show(schedule_views(models)))),
        ("Layers", gallery.show(layer_views(models))),
        ("Speed and memory", gallery.show([*cache_views(models), *speed_views(sources.benches)])),
        (
            "Recipe",
            "".join(html.details(m.name, f"<pre>{html.escape(r)}</pre>") for m in models if (r := m.conversion.recipe)),
        ),
        ("Environment", _environment(sources)),
    ]
    shown = union([*named, *sources.evaluations]) or names
    title = ", ".join(shown) if len(shown) <= 4 else f"{len(shown)} models side by side"
    lead = _lead(models) + html.warning("Left out of this report:", sources.left_out)
    return html.document(title, lead, sections, f"linearize {__version__}"), gallery.pictures


def evaluated(sources: Sources) -> dict[str, Measurement]:
    """What `evaluate` measured, each teacher once for every text and set of questions it was asked."""
    teachers = {
        name: (report.teacher_model, json.dumps(report.settings, sort_keys=True))
        for name, report in sources.evaluations.items()
        if report.teacher is not None
    }
    alone = len(set(teachers.values())) == 1
    taken: dict[tuple[str | None, str], str] = {}
    found: dict[str, Measurement] = {}
    for name, report in sources.evaluations.items():
        if report.teacher is not None and teachers[name] not in taken:
            taken[teachers[name]] = "teacher" if alone else f"teacher of {name}"
            found[taken[teachers[name]]] = report.teacher
        found[name] = report.student
    return found


def _answers(sources: Sources) -> list[View]:
    """The answers of each student to the questions of tasks against its teacher's."""
    views: list[View] = []
    for name, report in sources.evaluations.items():
        compared = compare(report.student, report.teacher) if report.teacher is not None else {}
        if compared:
            title = f"Answers to the same questions: {name} and its teacher"
            note = "Differences in percentage points; won: right by the student alone, lost: by the teacher alone."
            views.append(Table(title, note, columns=HEADER, rows=comparison_rows(compared)))
    return views


def measured(models: Sequence[Source]) -> dict[str, Measurement]:
    """The last measurement of each model, after those of their teachers, each once."""
    found = {name: teacher for name, (_, teacher) in teachers_of(models).items()}
    return found | {m.name: m.conversion.last for m in models if m.conversion.points.keys() - {"teacher"}}


def _quality(measurements: Mapping[str, Measurement], gallery: Gallery, prefix: str, trusted: bool) -> str:
    if not measurements:
        return ""
    probes, missing = probe_views(measurements, trusted=trusted)
    tables = [view for view in (tasks_table(measurements),) if view]
    shown = gallery.show([*tables, *standard_views(measurements)], prefix) + gallery.show(probes, prefix)
    notes = html.listed(noted({name: m.notes for name, m in measurements.items()}))
    return shown + gallery.show(samples_tables(measurements)) + notes + html.warning("Not shown:", missing)


def left_out(sources: Sources, *, trust_remote_code: bool = False) -> list[str]:
    """What the page does not show of what was given, and why: files, and results of probes."""
    shown = (measured(sources.models), evaluated(sources))
    missing = [told for found in shown for told in probe_views(found, trusted=trust_remote_code)[1]]
    return union([*sources.left_out, *missing])


def warnings(sources: Sources) -> list[str]:
    """What makes numbers that the page shows side by side incomparable."""
    trained = {m.name: conditions.of_conversion(m.conversion) for m in sources.models}
    taken = {name: conditions.of_report(report) for name, report in sources.evaluations.items()}
    found = conditions.differences(trained, measured(sources.models))
    return union([*found, *conditions.differences(taken, evaluated(sources))])


def _conditions(told: Mapping[str, conditions.Conditions], measurements: Mapping[str, Measurement]) -> str:
    """What was measured with what, and a warning where that differs."""
    note = "Lengths and windows are those of losses and KL; probes have their own."
    view = conditions.table("Measured with", told, note)
    apart = "Not everything here was measured alike, so that not all numbers can be compared:"
    warned = html.warning(apart, conditions.differences(told, measurements))
    return warned + (html.table(view) if view else "")


def _settings(sources: Sources) -> str:
    """Everything that the evaluations were asked for."""
    texts: dict[str, list[str]] = {}
    for name, report in sources.evaluations.items():
        if report.settings:
            texts.setdefault(yaml.safe_dump(report.settings, sort_keys=False, allow_unicode=True), []).append(name)
    return "".join(
        html.details(f"All settings of {', '.join(names)}", f"<pre>{html.escape(text)}</pre>")
        for text, names in texts.items()
    )


def _summary(models: Sequence[Source]) -> str:
    if not models:
        return ""
    numbers = "".join(html.tile(value, what) for value, what in tiles(models[0])) if len(models) == 1 else ""
    patterns = union(m.conversion.facts["layers"] for m in models)
    alike = {p: ", ".join(m.name for m in models if m.conversion.facts["layers"] == p) for p in patterns}
    strips = "".join(
        f'<tr><td class="text{" long" if len(names) > 60 else ""}">{html.escape(names)}</td>'
        f'<td class="text">{html.layers(pattern)}</td></tr>'
        for pattern, names in alike.items()
    )
    legend = (
        '<p class="soft"><span class="key" style="background:var(--mixer)"></span>mixer &emsp;'
        '<span class="key" style="background:var(--kept)"></span>softmax kept</p>'
    )
    grid = f'<div class="tiles">{numbers}</div>' if numbers else ""
    strip = f'<div class="scroll"><table>{strips}</table></div>\n'
    return f"{grid}{html.table(summary_table(models), heading=False)}{legend}{strip}"


def _points(models: Sequence[Source]) -> str:
    views = [points_table(model) for model in models if len(model.conversion.points) > 1]
    shown = "".join(html.table(view, heading=False) for view in views) if len(views) == 1 else ""
    shown = shown or "".join(html.details(view.title, html.table(view, heading=False)) for view in views)
    if len(views) > MANY:
        return html.details(f"From step to step, {len(views)} models", shown)
    return f"<h3>From step to step</h3>\n{shown}" if shown else ""


def _more(shown: str) -> str:
    return html.details("Learning rate, gradient and speed", shown) if shown else ""


def _lead(models: Sequence[Source]) -> str:
    lines = [
        f"{m.conversion.facts['source']} with {mixer_name(m.conversion.facts)}: "
        f"{m.conversion.facts['layers'].count('L')} of {len(m.conversion.facts['layers'])} attention layers replaced."
        for m in models[:1]
        if len(models) == 1
    ]
    return "".join(map(html.paragraph, lines))


def _environment(sources: Sources) -> str:
    evaluated = {name: {k: str(v) for k, v in r.environment.items()} for name, r in sources.evaluations.items()}
    timed = {
        name: {**{key: str(value) for key, value in bench.settings.items()}, "peak memory": bench.memory}
        for name, bench in sources.benches.items()
    }
    weights = {m.name: {"type of the weights": m.conversion.facts["dtype"]} for m in sources.models}
    titles = {"Conversions": weights, "Evaluations": evaluated, "Timings": timed}
    return "".join(html.table(view) for title, told in titles.items() if (view := conditions.table(title, told)))
