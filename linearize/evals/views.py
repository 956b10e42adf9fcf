"""What a measurement looks like: tables, lines, bars and heat maps, as plain data for terminals, pages and pictures.

A probe says what to show, `linearize report` how. All numbers are finite floats, or None where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Number = float | None


@dataclass(frozen=True)
class View:
    """What all views have."""

    title: str
    """A short heading, with the unit where one is needed."""
    note: str = ""
    """One or two sentences on how to read it."""


@dataclass(frozen=True, kw_only=True)
class Table(View):
    """Rows of cells: text, or numbers that the page rounds."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Number]]


@dataclass(frozen=True, kw_only=True)
class Lines(View):
    """Curves over one axis."""

    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    """Name of a curve -> its points, in order of x."""
    log_x: bool = False
    log_y: bool = False
    """Only for values above zero."""


@dataclass(frozen=True, kw_only=True)
class Bars(View):
    """Groups of bars, such as one a layer."""

    y_label: str
    labels: Sequence[str]
    """Of the groups."""
    series: Mapping[str, Sequence[Number]]
    """Name of a bar -> its height in each group."""
    log_y: bool = False
    """Whether heights may lie orders of magnitude apart, for a scale that then says so; else bars begin at 0."""


@dataclass(frozen=True, kw_only=True)
class HeatMap(View):
    """A value for every pair of x and y."""

    x_label: str
    y_label: str
    x: Sequence[str]
    y: Sequence[str]
    values: Sequence[Sequence[Number]]
    """A row for each of `y`, a column for each of `x`."""
    low: float = 0.0
    """The value at the dark end of the colours."""
    high: float = 1.0
    """The value at their bright end."""
