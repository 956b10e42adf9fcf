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
from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from linearize.evals.views import Bars, HeatMap, Lines, View
from linearize.report.numerals import short, tick_labels

INK = "#1b1f24"
PAGE_INK = "#010203"
"""Stands for the page's text colour in an SVG."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
MARKERS = "os^DvP"
HATCHES = ("", "///", "+++", "xxx")  # dots would be fifty kilobytes each in an SVG
WIDTH, HEIGHT, DPI = 6.4, 3.7, 160
COLUMN, BOTH = 7.2, 11.4
"""Inches up to which a figure fits one of two columns; one that does not is at least as wide as both."""
DIGIT, STANDING = 0.062, 0.11
"""Inches of a letter of the number above a bar, which stands on end where it is wider than the bar, and of the
narrowest bar that has one."""
APART = 100
"""The largest bar by the smallest, from which on a figure that may have a logarithmic scale gets one."""
CELLS = 420
"""Cells of a heat map up to which each has its number."""
CROWD = 8
"""Curves from which on a figure takes both columns."""
MARKED = 24
"""Points of a curve up to which each has its marker."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
"""Of the page, and of an SVG wherever it is opened."""
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
    text = re.sub(r"font: (?:\w+ )*([\d.]+px)[^;\"]*", r"font-size: \1", text)  # older versions of matplotlib
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    wide = float(text.partition('width="')[2].partition("pt")[0]) / 72
    least = 0.55 if wide <= COLUMN else 0.7  # a telephone shows the one whole, and scrolls the other
    looks = f"font-family: {FONT}; max-width: {1.15 * wide:.2f}in; min-width: {least * wide:.2f}in"
    text = text.replace("<svg ", f'<svg style="{looks}" ', 1)
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
    axes.yaxis.set_major_formatter(Labels())
    return figure, axes


class Labels(Formatter):
    """`tick_labels` of an axis."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        """A value without its neighbours."""
        return short(value)

    def format_ticks(self, values: Any) -> list[str]:
        """All ticks at once."""
        return tick_labels(list(values))


def _lines(view: Lines, style: Style, ink: str) -> Figure:
    width = BOTH if len(view.series) > CROWD else WIDTH
    figure, axes = _axes(ink, width, _height(view.series, width))
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
        _log_scale(axes, ys)
    if len(xs) <= TICKS:
        axes.set_xticks(xs)
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    else:
        logs = axes.get_xscale() == "log"
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)) if logs else Labels())
    axes.set_xlabel(view.x_label, color=ink)
    axes.set_ylabel(view.y_label, color=ink)
    _legend(figure, axes.get_lines(), names, ink)
    return figure


def _log_scale(axes: Any, values: Sequence[float]) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, (1,) if max(values) > 1000 * min(values) else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _bars(view: Bars, style: Style, ink: str) -> Figure:
    """From 0, but where heights lie far apart on a scale of which the label says that it is logarithmic."""
    heights = [value for series in view.series.values() for value in series if value is not None]
    log = view.log_y and bool(heights) and max(heights) > APART * min(heights) > 0
    names, groups = list(view.series), len(view.labels)
    count = max(1, len(names))
    wide = _wide(max(WIDTH, min(14.0, 1.6 + 0.14 * groups * count)))
    figure, axes = _axes(ink, wide, _height(view.series, wide))
    width, handles = min(0.5, 0.8 / count), []
    inches = 0.85 * wide * width / max(1, groups)
    turn = 90 if DIGIT * max((len(_above(value)) for value in heights), default=0) > inches else 0
    for i, (name, (colour, cycle)) in enumerate(zip(names, style.of(names, ink), strict=True)):
        there = [(g, value) for g, value in enumerate(view.series[name]) if value is not None]
        at = [g + (i - (count - 1) / 2) * width for g, _ in there]
        hatch = HATCHES[cycle % len(HATCHES)]
        bars = axes.bar(at, [v for _, v in there], width * 0.92, color=colour, hatch=hatch, edgecolor="none")
        handles.append(bars)
        for x, (_, value) in zip(at, there, strict=True):
            if value == 0 or inches >= STANDING:  # a zero is measured, and not to be taken for missing
                side = "top" if value < 0 else "bottom"
                axes.annotate(
                    _above(value),
                    (x, value),
                    (0, -2 if value < 0 else 2),
                    textcoords="offset points",
                    ha="center",
                    va=side,
                    fontsize=7,
                    color=ink,
                    rotation=turn,
                )
    axes.margins(y=0.16 if turn else 0.06)
    if log:
        _log_scale(axes, heights)
        axes.set_ylim(bottom=10 ** math.floor(math.log10(min(heights)) - 0.1))
    axes.set_xlim(-0.6, max(1, groups) - 0.4)  # also where a group's first bars are missing
    if not log:
        axes.axhline(0, color=ink, linewidth=0.8, alpha=0.5)
    long = max((len(label) for label in view.labels), default=0) * groups > 11 * wide
    axes.set_xticks(range(groups), view.labels, rotation=30 if long else 0, ha="right" if long else "center")
    axes.set_ylabel(f"{view.y_label} (log scale)" if log else view.y_label, color=ink)
    _legend(figure, handles, names, ink)
    return figure


def _heat_map(view: HeatMap, style: Style, ink: str) -> Figure:
    rows, columns = len(view.y), len(view.x)
    width = _wide(min(14.0, max(WIDTH, 1.8 + 0.42 * columns)))
    figure, axes = _axes(ink, width, min(14.0, max(2.2, 1.3 + 0.32 * rows)))
    axes.grid(False)
    values = [[math.nan if value is None else value for value in row] for row in view.values]
    picture = axes.imshow(values, cmap="viridis", vmin=view.low, vmax=view.high, aspect="auto", interpolation="nearest")
    every = math.ceil(columns * max(map(len, view.x), default=0) / (11 * width))
    axes.set_xticks(range(0, columns, every), list(view.x)[::every])
    axes.set_yticks(range(rows), view.y)
    axes.set_xlabel(view.x_label, color=ink)
    axes.set_ylabel(view.y_label, color=ink)
    if rows * columns <= CELLS and columns <= 3 * width:
        for y, row in enumerate(view.values):
            for x, value in enumerate(row):
                share = 0.0 if value is None else (value - view.low) / ((view.high - view.low) or 1)
                colour = ink if value is None else "white" if share < 0.6 else "black"
                axes.text(x, y, short(value, 2), ha="center", va="center", fontsize=8, color=colour)
    bar = figure.colorbar(picture, ax=axes, pad=0.02, aspect=6 * figure.get_figheight())
    bar.ax.tick_params(colors=ink, length=3)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    return figure


PICTURES: dict[type, Callable[[Any, Style, str], Figure]] = {Lines: _lines, Bars: _bars, HeatMap: _heat_map}


def _wide(width: float) -> float:
    return width if width <= COLUMN else max(width, BOTH)


def _above(value: float) -> str:
    """The number at a bar: losses differ in their third decimal."""
    return f"{value:.3f}" if 1 <= abs(value) < 10 else short(value)


def _height(series: Any, width: float = WIDTH) -> float:
    """Room for the legend below the axes."""
    return HEIGHT + 0.2 * max(0, math.ceil(len(series) / _legend_columns(list(series), width)) - 2)


def _legend_columns(names: Sequence[str], width: float = WIDTH) -> int:
    return max(1, min(len(names), round(4 * width / WIDTH), int(13 * width) // (max(map(len, names), default=0) + 8)))


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str], ink: str) -> None:
    if not names:
        return
    shown = [f" {name}" if name.startswith("_") else name for name in names]  # matplotlib hides _names
    columns = _legend_columns(names, figure.get_figwidth())
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
