"""Numbers as text: `short(value)` for cells and labels, `tick_labels(values)` for the ticks of an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from linearize.evals.views import Number

UNITS = ((1e9, "G"), (1e6, "M"), (1e5, "k"))
"""From which size on a number is written in which unit."""
MOST_DECIMALS = 6


def tick_labels(values: Sequence[float]) -> list[str]:
    """Of the ticks of a linear axis: 0.000, 0.025, 0.050; all have the unit and the decimals that the step needs."""
    ordered = sorted(values)
    near = min((b - a for a, b in pairwise(ordered)), default=1.0) / 1000
    largest = max(map(abs, values), default=0.0)
    unit, name = next(((unit, name) for unit, name in UNITS if largest >= unit), (1.0, ""))
    unit = 1e3 if name == "k" else unit
    for decimals in range(MOST_DECIMALS + 1):
        if all(abs(round(value / unit, decimals) * unit - value) <= near for value in values):
            return [
                f"{round(value / unit, decimals) + 0.0:,.{decimals}f}{name}" if abs(value) > near or not name else "0"
                for value in values
            ]
    return [f"{value:.3g}" for value in values]


def short(value: Number, digits: int = 3) -> str:
    """`value` with few digits: 0.0312, 12.5, 2,048, 131k, 1.5M; a dash for None."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else str(value)
    size = abs(value)
    for unit, name in UNITS:
        if size >= unit:
            scale = 1e3 if name == "k" else unit
            return f"{value / scale:,.4g}{name}"
    if size >= 1000 or (size >= 10 and value == round(value)):
        return f"{value:,.0f}"
    if size and size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{digits}g}"
