"""The results of probes, of one or several models: as views for pages, and as text for terminals.

`probe_views({"student": measurement})` finds each probe by the key that its result carries; `as_text(view)` writes any
view as a table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from linearize.errors import UserError
from linearize.evals.measure import Measurement
from linearize.evals.probes.base import Probe
from linearize.evals.table import NOTHING, grid, union
from linearize.evals.views import Bars, HeatMap, Lines, Table, View
from linearize.registry import find

ROWS = 8
"""Points of a curve in a table; of more it has as many, evenly chosen."""


def probe_views(
    measurements: Mapping[str, Measurement], *, trusted: bool, brief: bool = False
) -> tuple[list[View], list[str]]:
    """The views of all probes, and why some have none.

    Args:
        measurements: name of a model -> what was measured on it.
        trusted: whether results may name probes as `module:Class`, which imports code.
        brief: take what is meant for terminals, `Probe.summary`.
    """
    kinds: dict[str, list[tuple[str, dict[str, Any], Any]]] = {}
    views: list[View] = []
    missing = []
    for name, measurement in measurements.items():
        for probe in measurement.probes:
            settings = probe.get("probe")
            if "result" in probe and probe["result"] is None:
                continue  # the notes tell why
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
            shown, broken = _views_of(found.summary if brief else found.views, results)
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


def _views_of(
    show: Callable[[dict[str, Any]], Sequence[View]], results: Mapping[str, Any]
) -> tuple[list[View], dict[str, str]]:
    """The views of the results that can be shown, and why the others cannot, by model."""
    broken = {}
    for name, result in results.items():
        try:
            for view in show({name: result}):
                TypeAdapter(type(view)).validate_python(vars(view))
        except KeyError as error:
            broken[name] = f"it has no {error}"
        except Exception as error:  # whatever a probe's views make of data of another version
            broken[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    whole = {name: result for name, result in results.items() if name not in broken}
    return (list(show(whole)) if whole else []), broken


def as_text(view: View) -> str:
    """A view as a title, a Markdown table and its note; the numbers of a column have as many decimals."""
    header, rows = _cells(view)
    columns = list(zip(*rows, strict=True))
    if not isinstance(view, Table):  # all of one kind
        shared = decimals(cell for column in columns[1:] for cell in column)
        texts = (
            [list(map(str, columns[0])), *([number(cell, shared) for cell in c] for c in columns[1:])] if rows else []
        )
    else:
        texts = [[number(cell, decimals(column)) for cell in column] for column in columns]
    body = grid(header, list(zip(*texts, strict=True))) if rows else "nothing was measured"
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
    if len(curves) > ROWS:  # a row for each curve, such as one a layer
        return [view.x_label, *(f"{x:,g}" for x in chosen)], [[k, *map(v.get, chosen)] for k, v in curves.items()]
    return [view.x_label, *curves], [[f"{x:,g}", *(curve.get(x) for curve in curves.values())] for x in chosen]


def decimals(cells: Iterable[Any]) -> int:
    """Digits behind the point with which the largest of some numbers has three or four that tell something."""
    largest = max((abs(cell) for cell in cells if isinstance(cell, float)), default=0.0)
    if largest == 0.0:
        return 0
    magnitude = math.floor(math.log10(largest))
    return min(2 - magnitude, 6) if magnitude < -1 else max(3 - max(magnitude, 0), 0)


def number(cell: Any, digits: int) -> str:
    """A cell with that many digits behind the point; one so small that nothing would be left of it in powers of ten."""
    if cell is None:
        return NOTHING
    if not isinstance(cell, float):
        return f"{cell:,}" if isinstance(cell, int) else str(cell)
    return f"{cell:.0e}" if cell and abs(cell) < 0.5 * 10.0**-digits else f"{cell:,.{digits}f}"
