"""The results of probes, of one or several models: as views for pages, and as text for terminals.

`probe_views({"student": measurement})` finds each probe by the key that its result carries; `as_text(view)` writes any
view as a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

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
    kinds: dict[str, list[tuple[str, dict[str, Any], Any]]] = {}
    views: list[View] = []
    missing = []
    for name, measurement in measurements.items():
        for probe in measurement.probes:
            settings = probe.get("probe")
            if isinstance(settings, dict) and isinstance(settings.get("type"), str):
                kinds.setdefault(settings["type"], []).append((name, settings, probe.get("result")))
            else:
                missing.append(f"a probe of {name} was measured, but cannot be shown: it does not say which it is")
    for key, taken in kinds.items():
        try:
            found = find("evals.probes", key, Probe, trusted=trusted)
        except UserError as error:
            missing.append(f"the probe {key} was measured, but cannot be shown: {error}")
            continue
        for suffix, results in _by_settings(found, taken):
            shown, broken = _views_of(found, results)
            views += [replace(view, title=view.title + suffix) for view in shown]
            missing += [
                f"the probe {key}{suffix} of {name} was measured, but cannot be shown: its result is damaged, or of "
                f"another version of the probe ({why}); measure it again"
                for name, why in broken.items()
            ]
    return views, union(missing)


def _by_settings(probe: type[Probe], taken: Sequence[tuple[str, dict[str, Any], Any]]) -> list[tuple[str, dict]]:
    """The results by model of each group of like settings, under a suffix that says what sets it apart; none where
    there is one group.
    """
    groups: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for name, given, result in taken:
        settings = _complete(probe, given)
        same = next((results for known, results in groups if known == settings), None)
        if same is None:
            groups.append((settings, same := {}))
        same[name] = result
    keys = union(key for settings, _ in groups for key in settings)
    differing = [key for key in keys if any(s.get(key) != groups[0][0].get(key) for s, _ in groups)]

    def suffix(settings: dict[str, Any]) -> str:
        told = [f"{key}={_setting(settings.get(key))}" for key in differing]
        return f" ({', '.join(told)})" if told else ""

    return [(suffix(settings), results) for settings, results in groups]


def _complete(probe: type[Probe], settings: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of what an older version did not have yet; as they are where they do not fit any longer."""
    try:
        return probe.Config.model_validate(settings).model_dump(mode="json")
    except ValidationError:
        return settings


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _views_of(probe: type[Probe], results: Mapping[str, Any]) -> tuple[list[View], dict[str, str]]:
    """The views of the results that can be shown, and why the others cannot, by model."""
    broken = {}
    for name, result in results.items():
        try:
            for view in probe.views({name: result}):
                TypeAdapter(type(view)).validate_python(vars(view))
        except KeyError as error:
            broken[name] = f"it has no {error}"
        except Exception as error:  # whatever a probe's views make of data of another version
            broken[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    whole = {name: result for name, result in results.items() if name not in broken}
    return (list(probe.views(whole)) if whole else []), broken


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
