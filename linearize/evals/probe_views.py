"""The results of probes, of one or several models: as views for pages, and as text for terminals.

`probe_views({"student": measurement})` finds each probe by the key that its result carries; `as_text(view)` writes any
view as a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from linearize.errors import UserError
from linearize.evals.measure import Measurement
from linearize.evals.probes.base import Probe
from linearize.evals.table import NOTHING, grid, union
from linearize.evals.views import Bars, HeatMap, Lines, Table, View
from linearize.registry import find

ROWS = 16
"""Rows of a table of curves; of more points it has as many, evenly chosen."""


def probe_views(measurements: Mapping[str, Measurement], *, trusted: bool) -> tuple[list[View], list[str]]:
    """The views of all probes, and why some have none.

    Args:
        measurements: name of a model -> what was measured on it.
        trusted: whether results may name probes as `module:Class`, which imports code.
    """
    grouped: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for name, measurement in measurements.items():
        for probe in measurement.probes:
            settings = {key: value for key, value in probe["probe"].items() if key != "type"}
            grouped.setdefault((probe["probe"]["type"], json.dumps(settings)), {})[name] = probe["result"]
    views: list[View] = []
    missing = []
    for (key, _), results in grouped.items():
        try:
            found = find("evals.probes", key, Probe, trusted=trusted)
        except UserError as error:
            missing.append(f"the probe {key} was measured, but cannot be shown: {error}")
            continue
        views += found.views(results)
    return views, union(missing)


def as_text(view: View) -> str:
    """A view as a title, a Markdown table and its note."""
    header, rows = _cells(view)
    body = grid(header, [[_text(cell) for cell in row] for row in rows]) if rows else "nothing was measured"
    return "\n\n".join([view.title, body, *([view.note] if view.note else [])])


def _cells(view: View) -> tuple[list[str], Sequence[Sequence[Any]]]:
    if isinstance(view, Table):
        return list(view.columns), view.rows
    if isinstance(view, Bars):
        heights = list(view.series.values())
        return [view.y_label, *view.series], [[label, *(h[i] for h in heights)] for i, label in enumerate(view.labels)]
    if isinstance(view, HeatMap):
        corner = f"{view.y_label} \\ {view.x_label}"
        return [corner, *view.x], [[y, *values] for y, values in zip(view.y, view.values, strict=True)]
    assert isinstance(view, Lines)
    curves = {name: dict(points) for name, points in view.series.items()}
    at = sorted(set().union(*curves.values()))
    chosen = at if len(at) <= ROWS else [at[i * (len(at) - 1) // (ROWS - 1)] for i in range(ROWS)]
    return [view.x_label, *curves], [[f"{x:,g}", *(curve.get(x) for curve in curves.values())] for x in chosen]


def _text(cell: Any) -> str:
    if cell is None:
        return NOTHING
    return f"{cell:,.4g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)
