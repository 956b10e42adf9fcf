"""Draws a view: `draw(view, style)` is a matplotlib figure, `svg` and `png` what it is on a page and in a file.

One function for each kind of view that is a picture. A model has the same colour, dash and marker in all figures of a
`Style`; the palette is that of Okabe and Ito (2008), which most colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from linearize.evals.views import Bars, HeatMap, Lines, Number, View

INK = "#1b1f24"
PAGE_INK = "#010203"
"""Stands for the page's text colour in an SVG."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
MARKERS = "os^DvP"
HATCHES = ("", "///", "+++", "xxx")  # dots would be fifty kilobytes each in an SVG
WIDTH, HEIGHT, DPI = 6.4, 3.7, 160
MARKED = 24
"""Points of a curve up to which each has its marker."""
TICKS = 8
"""Lengths up to which each has its own tick."""
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "linearize",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
}


@dataclass(frozen=True)
class Style:
    """Gives every name of a report its looks."""

    models: Sequence[str]
    """Students, in order."""
    teachers: Sequence[str] = ()
    """Drawn in the colour of the text."""

    def owner(self, series: str) -> str | None:
        """The model or teacher that a series is of: the longest name that its own holds."""
        held = [name for name in (*self.teachers, *self.models) if name in series]
        exact = [name for name in held if name == series]
        return exact[0] if exact else max(held, key=len, default=None)

    def of(self, series: Sequence[str], ink: str) -> list[tuple[str, int]]:
        """(colour, cycle) of each series; the cycle tells those of one colour apart, by dashes or hatches."""
        found: dict[str, tuple[str, int]] = {}
        strangers = 0
        for name in sorted(series, key=lambda name: self.owner(name) != name):  # a model's own curve is the solid one
            owner = self.owner(name)
            if owner in self.teachers:
                colour, cycle = ink, 0
            else:
                place = len(self.models) + strangers if owner is None else list(self.models).index(owner)
                strangers += owner is None
                colour, cycle = COLOURS[place % len(COLOURS)], place // len(COLOURS)
            while (colour, cycle) in found.values():
                cycle += 1
            found[name] = colour, cycle
        return [found[name] for name in series]


def draw(view: View, style: Style, ink: str = INK) -> Figure:
    """The picture of a view, text and axes in `ink`, on nothing."""
    with matplotlib.rc_context(SETTINGS):
        return PICTURES[type(view)](view, style, ink)


def is_picture(view: View) -> bool:
    """Whether `draw` takes it; a table is none."""
    return type(view) in PICTURES


def png(view: View, style: Style) -> bytes:
    """A PNG file with title, on white."""
    with matplotlib.rc_context(SETTINGS):
        figure = draw(view, style)
        figure.suptitle(view.title, color=INK, fontsize=11)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def svg(view: View, style: Style, key: str) -> str:
    """An `<svg>` element in the page's text colour and font; `key` keeps its ids apart from those of others."""
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(SETTINGS):
        out = io.StringIO()
        draw(view, style, PAGE_INK).savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(PAGE_INK, "currentColor")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    wide = float(text.partition('width="')[2].partition("pt")[0]) / 72
    text = text.replace("<svg ", f'<svg style="max-width: {1.15 * wide:.2f}in; min-width: {0.7 * wide:.2f}in" ', 1)
    return re.sub(r'(url\(|href=")#', rf"\1#{key}-", text)


def _axes(ink: str, width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set(color=ink, alpha=0.5)
    axes.tick_params(colors=ink, length=3)
    axes.grid(axis="y", color=ink, alpha=0.14, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, *axes.get_ylim())))
    return figure, axes


def _lines(view: Lines, style: Style, ink: str) -> Figure:
    figure, axes = _axes(ink, height=_height(view.series))
    names = list(view.series)
    for name, (colour, cycle) in zip(names, style.of(names, ink), strict=True):
        points = view.series[name]
        looks = {"color": colour, "linestyle": DASHES[cycle % len(DASHES)], "linewidth": 1.8}
        if len(points) <= MARKED:
            place = COLOURS.index(colour) if colour in COLOURS else 0
            looks |= {"marker": MARKERS[place], "markersize": 4.5}
        axes.plot([x for x, _ in points], [y for _, y in points], **looks)
    xs = sorted({x for points in view.series.values() for x, _ in points})
    if view.log_x and xs and xs[0] > 0:
        axes.set_xscale("log", base=2)
    ys = [y for points in view.series.values() for _, y in points]
    if view.log_y and ys and max(ys) > 4 * min(ys) > 0:  # within less, a logarithm has hardly a tick
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, (1,) if max(ys) > 1000 * min(ys) else (1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if len(xs) <= TICKS:
        axes.set_xticks(xs)
        axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel(view.x_label, color=ink)
    axes.set_ylabel(view.y_label, color=ink)
    _legend(figure, axes.get_lines(), names, ink)
    return figure


def _bars(view: Bars, style: Style, ink: str) -> Figure:
    names, groups = list(view.series), len(view.labels)
    count = max(1, len(names))
    figure, axes = _axes(ink, max(WIDTH, min(14.0, 1.6 + 0.14 * groups * count)), _height(view.series))
    width, handles = min(0.5, 0.8 / count), []
    for i, (name, (colour, cycle)) in enumerate(zip(names, style.of(names, ink), strict=True)):
        there = [(g, value) for g, value in enumerate(view.series[name]) if value is not None]
        at = [g + (i - (count - 1) / 2) * width for g, _ in there]
        hatch = HATCHES[cycle % len(HATCHES)]
        bars = axes.bar(at, [v for _, v in there], width * 0.92, color=colour, hatch=hatch, edgecolor="none")
        handles.append(bars)
        for x, (_, value) in zip(at, there, strict=True):
            if value == 0:  # measured, and not to be taken for missing
                axes.text(x, 0, "0", ha="center", va="bottom", fontsize=7, color=ink)
    axes.axhline(0, color=ink, linewidth=0.8, alpha=0.5)
    long = max((len(label) for label in view.labels), default=0) * groups > 72
    axes.set_xticks(range(groups), view.labels, rotation=30 if long else 0, ha="right" if long else "center")
    axes.set_ylabel(view.y_label, color=ink)
    _legend(figure, handles, names, ink)
    return figure


def _heat_map(view: HeatMap, style: Style, ink: str) -> Figure:
    rows, columns = len(view.y), len(view.x)
    width = min(12.0, max(WIDTH, 1.8 + 0.42 * columns))
    figure, axes = _axes(ink, width, min(10.0, max(2.6, 1.3 + 0.32 * rows)))
    axes.grid(False)
    values = [[math.nan if value is None else value for value in row] for row in view.values]
    picture = axes.imshow(values, cmap="viridis", vmin=view.low, vmax=view.high, aspect="auto", interpolation="nearest")
    every = math.ceil(columns / 16)
    axes.set_xticks(range(0, columns, every), list(view.x)[::every])
    axes.set_yticks(range(rows), view.y)
    axes.set_xlabel(view.x_label, color=ink)
    axes.set_ylabel(view.y_label, color=ink)
    if rows * columns <= 150:
        for y, row in enumerate(view.values):
            for x, value in enumerate(row):
                share = 0.0 if value is None else (value - view.low) / ((view.high - view.low) or 1)
                colour = ink if value is None else "white" if share < 0.6 else "black"
                axes.text(x, y, short(value, 2), ha="center", va="center", fontsize=8, color=colour)
    bar = figure.colorbar(picture, ax=axes, pad=0.02)
    bar.ax.tick_params(colors=ink, length=3)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    return figure


PICTURES: dict[type, Callable[[Any, Style, str], Figure]] = {Lines: _lines, Bars: _bars, HeatMap: _heat_map}


def _height(series: Any) -> float:
    """Room for the legend below the axes."""
    return HEIGHT + 0.2 * max(0, math.ceil(len(series) / _legend_columns(list(series))) - 2)


def _legend_columns(names: Sequence[str]) -> int:
    return max(1, min(4, 84 // (max(map(len, names), default=0) + 8)))


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str], ink: str) -> None:
    if not names:
        return
    shown = [f" {name}" if name.startswith("_") else name for name in names]  # matplotlib hides _names
    columns = _legend_columns(names)
    figure.legend(
        handles,
        shown,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        labelcolor=ink,
        fontsize=9,
        handlelength=2.4,
    )


def _tick(value: float, low: float, high: float) -> str:
    """`value` with as many digits as tell the ticks between `low` and `high` apart."""
    if max(abs(low), abs(high)) >= 1000 or high <= low:
        return short(value)
    return f"{value:.{max(0, math.ceil(-math.log10((high - low) / 10)))}f}"


def short(value: Number, digits: int = 3) -> str:
    """`value` with few digits: 0.0312, 12.5, 2,048, 131k, 1.5M; a dash for None."""
    if value is None:
        return "–"
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e5, "k")):
        if size >= unit:
            scale = 1e3 if name == "k" else unit
            return f"{value / scale:,.4g}{name}"
    if size >= 1000 or (size >= 10 and value == round(value)):
        return f"{value:,.0f}"
    if size and size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{digits}g}"
