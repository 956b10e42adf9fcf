"""Writes the report: one HTML page that loads nothing from elsewhere, and its figures as PNG files beside it.

`write_page(["runs/gdn", "runs/lolcats"], "report.html")` writes `report.html` and `report/*.png`. Nothing is measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from linearize import __version__
from linearize.errors import UserError, check_target, disk_full
from linearize.evals.items import HEADER, compare, comparison_rows
from linearize.evals.measure import Measurement
from linearize.evals.probe_views import probe_views
from linearize.evals.standard_views import standard_views
from linearize.evals.table import union
from linearize.evals.views import Bars, HeatMap, Lines, Table, View
from linearize.report import html
from linearize.report.figures import Style, is_picture, png, svg
from linearize.report.sources import Source, Sources, read_sources
from linearize.report.summary import points_table, samples_table, summary_table, tasks_table, tiles
from linearize.report.views import cache_views, layer_views, schedule_views, speed_views, training_views


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
    page = Path(page)
    if page.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{page} is no name of a page; give one that ends with .html")
    check_target(page)
    folder = page.with_suffix("")
    if folder == page or (folder / "run").is_dir() or (folder / "config.json").is_file():
        raise UserError(
            f"cannot write the pictures of {page} into {folder}; name the page otherwise, such as report.html"
        )
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


def render(sources: Sources, *, trust_remote_code: bool = False) -> tuple[str, dict[str, bytes]]:
    """The page, and its pictures by file name."""
    runs = measured(sources.models)
    reports = _evaluated(sources)
    named = [m.name for m in sources.models]
    names = union([*named, *sources.evaluations, *sources.benches])
    teachers = [*(name for name in union([*runs, *reports]) if name not in names), "softmax"]
    gallery = Gallery(Style(names, teachers))
    models = sources.models
    sections = [
        ("Summary", _summary(models)),
        ("Quality", _quality(runs, gallery, "", trust_remote_code) + _points(models)),
        ("Evaluation", _quality(reports, gallery, "evaluation", trust_remote_code) + gallery.show(_answers(sources))),
        ("Training", gallery.show(training_views(models)) + _more(gallery.show(schedule_views(models)))),
        ("Layers", gallery.show(layer_views(models))),
        ("Speed and memory", gallery.show([*cache_views(models), *speed_views(sources.benches)])),
        ("Recipe", "".join(html.details(m.name, f"<pre>{html.escape(m.recipe)}</pre>") for m in models if m.recipe)),
        ("Environment", _environment(sources)),
    ]
    shown = union([*named, *sources.evaluations]) or names
    title = ", ".join(shown) if len(shown) <= 4 else f"{len(shown)} models side by side"
    return html.document(title, _lead(models), sections, f"linearize {__version__}"), gallery.pictures


def _evaluated(sources: Sources) -> dict[str, Measurement]:
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


class Gallery:
    """Turns views into HTML and keeps the PNG of each, under a name made of its title."""

    def __init__(self, style: Style):
        self.style = style
        self.pictures: dict[str, bytes] = {}

    def show(self, views: Sequence[View], prefix: str = "") -> str:
        """A grid of the pictures, then the tables."""
        pictures = [self._figure(view, prefix) for view in views if is_picture(view)]
        return html.figures(pictures) + "".join(html.table(view) for view in views if isinstance(view, Table))

    def _figure(self, view: View, prefix: str) -> str:
        assert isinstance(view, Lines | Bars | HeatMap)
        key = re.sub(r"[^a-z0-9]+", "-", f"{prefix} {view.title}".lower()).strip("-")[:80] or "figure"
        while f"{key}.png" in self.pictures:
            key += "-2"
        self.pictures[f"{key}.png"] = png(view, self.style)
        return html.figure(view.title, view.note, svg(view, self.style, key))


def measured(models: Sequence[Source]) -> dict[str, Measurement]:
    """The last measurement of each model, after those of their teachers, each once."""
    teachers: dict[str, tuple[str, Measurement]] = {}
    for model in models:
        if (teacher := model.conversion.points.get("teacher")) is not None:
            losses = [(loss.length, round(loss.loss, 2)) for loss in teacher.losses]
            teachers.setdefault(f"{model.conversion.facts['source']} {losses}", (model.name, teacher))
    alone = len(teachers) == 1
    found = {"teacher" if alone else f"teacher of {name}": teacher for name, teacher in teachers.values()}
    for model in models:
        points = {name: m for name, m in model.conversion.points.items() if name != "teacher"}
        if points:
            found[model.name] = list(points.values())[-1]
    return found


def _quality(measurements: Mapping[str, Measurement], gallery: Gallery, prefix: str, trusted: bool) -> str:
    if not measurements:
        return ""
    probes, missing = probe_views(measurements, trusted=trusted)
    tables = [view for view in (tasks_table(measurements), samples_table(measurements)) if view]
    shown = gallery.show([*standard_views(measurements), *probes, *tables], prefix)
    notes = union(note for m in measurements.values() for note in m.notes)
    return shown + html.listed([*notes, *missing])


def _summary(models: Sequence[Source]) -> str:
    if not models:
        return ""
    numbers = "".join(html.tile(value, what) for value, what in tiles(models[0])) if len(models) == 1 else ""
    strips = "".join(
        f'<tr><td class="text">{html.escape(m.name)}</td>'
        f'<td class="text">{html.layers(m.conversion.facts["layers"])}</td></tr>'
        for m in models
    )
    legend = (
        '<p class="soft"><span class="key" style="background:var(--mixer)"></span>mixer &emsp;'
        '<span class="key" style="background:var(--kept)"></span>softmax kept</p>'
    )
    grid = f'<div class="tiles">{numbers}</div>' if numbers else ""
    return f"{grid}{html.table(summary_table(models), heading=False)}{legend}<table>{strips}</table>\n"


def _points(models: Sequence[Source]) -> str:
    views = [points_table(model) for model in models if len(model.conversion.points) > 1]
    shown = "".join(html.table(view, heading=False) for view in views) if len(views) == 1 else ""
    shown = shown or "".join(html.details(view.title, html.table(view, heading=False)) for view in views)
    return f"<h3>From step to step</h3>\n{shown}" if shown else ""


def _more(shown: str) -> str:
    return html.details("Learning rate, gradient and speed", shown) if shown else ""


def _lead(models: Sequence[Source]) -> str:
    lines = [
        f"{m.conversion.facts['source']} with {m.conversion.facts['mixer']}: "
        f"{m.conversion.facts['layers'].count('L')} of {len(m.conversion.facts['layers'])} attention layers replaced."
        for m in models[:1]
        if len(models) == 1
    ]
    return "".join(map(html.paragraph, lines))


def _environment(sources: Sources) -> str:
    rows: list[list[str | float | None]] = []
    for name, report in sources.evaluations.items():
        rows += [[f"{name}, evaluate", key, str(value)] for key, value in report.environment.items()]
    for name, bench in sources.benches.items():
        rows += [[f"{name}, bench", key, str(value)] for key, value in bench.settings.items()]
        rows.append([f"{name}, bench", "peak memory", bench.memory])
    rows += [[m.name, "type of the weights", m.conversion.facts["dtype"]] for m in sources.models]
    return html.table(Table("Environment", columns=["", "", "value"], rows=rows), heading=False) if rows else ""
