"""Views of plans and logs against sums written out, and the looks of models in figures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from left import FACTS, bench, folder

from linearize.bench import BenchReport
from linearize.evals.views import Bars, HeatMap, Lines
from linearize.report.conversion_views import (
    cache_bytes,
    cache_views,
    layer_views,
    schedule_views,
    speed_views,
    thinned,
)
from linearize.report.figures import BOTH, COLOURS, COLUMN, FONT, INK, Style, draw, svg
from linearize.report.numerals import short, tick_labels
from linearize.report.page import measured
from linearize.report.sources import read_sources


def test_cache_bytes_are_states_and_what_softmax_layers_keep() -> None:
    assert cache_bytes(FACTS, 1000) == 4096 + 64 * 1000 + 4096
    assert cache_bytes(FACTS, 1000, converted=False) == 64 * 1000 + 64 * 1000 + 64 * 128, "the last one sees 128 tokens"
    assert cache_bytes({**FACTS, "layers": "SSS"}, 100) == 3 * 64 * 100


def test_thinned_points_are_means_of_consecutive_ones() -> None:
    points = [(float(i), float(i * i)) for i in range(10)]
    assert thinned(points, 10) == points
    assert thinned(points, 4) == [(1.0, 5 / 3), (4.0, 50 / 3), (7.0, 149 / 3), (9.0, 81.0)]


def test_layers_at_the_end_of_training_and_over_it(tmp_path: Path) -> None:
    bars, course = layer_views(read_sources([folder(tmp_path / "gdn")]).models)
    assert isinstance(bars, Bars) and isinstance(course, HeatMap)
    last = [0.5 ** (step / 10) for step in range(36, 40)]
    assert bars.labels == ["layer 0", "layer 2"]
    assert bars.series["gdn"] == pytest.approx([4 * sum(last) / 4, 8 * sum(last) / 4])
    means = [sum(0.5 ** (step / 10) for step in range(i, i + 4)) / 4 for i in range(0, 40, 4)]
    assert course.values[1] == pytest.approx([mean / means[0] for mean in means])


def test_stages_follow_each_other_on_the_axis_of_tokens(tmp_path: Path) -> None:
    rate = schedule_views(read_sources([folder(tmp_path / "gdn")]).models)[0]
    assert isinstance(rate, Lines)
    assert [x for x, _ in rate.series["gdn"]] == [25.0 * (i + 1) for i in range(80)]


def test_teachers_stand_once_unless_they_differ(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "a" / "gdn"), folder(tmp_path / "b" / "gdn", loss=4)
    models = read_sources([one, two, one]).models
    assert list(measured(models)) == ["teacher", "a/gdn", "b/gdn"]
    assert list(cache_views(models)[0].series) == ["softmax", "a/gdn", "b/gdn"]  # type: ignore[attr-defined]
    other = folder(tmp_path / "other", source="another")
    assert list(measured(read_sources([one, other]).models)) == ["teacher of gdn", "teacher of other", "gdn", "other"]


def test_a_bench_comes_back_from_json_and_is_shown(tmp_path: Path) -> None:
    path = bench(tmp_path / "timed.json")
    again = BenchReport.from_json(path)
    again.to_json(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(path.read_text())
    prefill = speed_views({"gdn": again})[0]
    assert isinstance(prefill, Lines)
    assert prefill.series == {"softmax": [(512, 1000.0)], "gdn": [(512, 1000.0), (2048, 900.0)]}


def test_a_model_looks_the_same_in_all_figures() -> None:
    style = Style(["gdn", "gdn-hybrid", *"abcdefgh"], ["teacher"])
    assert style.of(["gdn-hybrid, linear off", "gdn-hybrid", "teacher"], INK) == [
        (COLOURS[1], 1),
        (COLOURS[1], 0),
        (INK, 0),
    ]
    looks = style.of(style.models, INK)
    assert len(set(looks)) == len(looks) == 10 and looks[0][0] == looks[6][0] == COLOURS[0]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 0.025, 0.05], ["0.000", "0.025", "0.050"]),
        ([0.1 * i for i in range(-1, 4)], ["-0.1", "0.0", "0.1", "0.2", "0.3"]),
        ([2, 4], ["2", "4"]),
        ([0, 2.5e5, 5e5], ["0", "250k", "500k"]),
        ([1e6, 1.25e6], ["1.00M", "1.25M"]),
        ([0, 5e-9], ["0", "5e-09"]),
        ([], []),
    ],
)
def test_ticks_have_the_decimals_of_their_step(values: list[float], labels: list[str]) -> None:
    assert tick_labels(values) == labels


@pytest.mark.parametrize("kind", ["lines", "bars"])
def test_axes_are_labelled_without_rounding(kind: str) -> None:
    heights = [0.0, 0.07, 0.125]
    view: Lines | Bars = Bars("t", y_label="y", labels=list("abc"), series={"m": heights})
    if kind == "lines":
        view = Lines("t", x_label="x", y_label="y", series={"m": [(i / 8, y) for i, y in enumerate(heights)]})
    figure = draw(view, Style(["m"]))
    figure.canvas.draw()
    axis = figure.axes[0].yaxis
    ticks = {label.get_text(): at for label, at in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)}
    assert len(ticks) > 3 and all(float(text) == pytest.approx(at, abs=1e-9) for text, at in ticks.items())


def test_an_svg_says_its_font_and_size_wherever_it_is_opened() -> None:
    text = svg(Lines("t", x_label="x", y_label="y", series={"a": [(1, 2), (2, 3)]}), Style(["a"]), "one")
    root = text[: text.index(">")]
    assert f"font-family: {FONT}" in root and 'xmlns="http://www.w3.org/2000/svg"' in root
    assert not re.search(r"font: |font-family", text[len(root) :])
    texts = re.findall(r"<text[^>]*>", text)
    assert texts and all("font-size: " in opened for opened in texts)


def test_crowded_figures_take_both_columns() -> None:
    def wide(view: Lines | Bars | HeatMap) -> float:
        return draw(view, Style([])).get_figwidth()

    def bars(models: int) -> Bars:
        return Bars("t", y_label="y", labels=["a", "b"], series={f"m{i}": [1.0, 2.0] for i in range(models)})

    assert wide(bars(3)) <= COLUMN and wide(bars(20)) >= BOTH
    curves = {f"m{i}": [(1.0, 2.0)] for i in range(20)}
    assert wide(Lines("t", x_label="x", y_label="y", series=curves)) >= BOTH
    assert all(not COLUMN < wide(bars(models)) < BOTH for models in range(1, 24))


@pytest.mark.parametrize("low", [0.03, 0.0, -0.5])
def test_bars_begin_at_zero_whatever_their_heights(low: float) -> None:
    view = Bars("t", y_label="y", labels=["a", "b"], series={"m": [2.0, low], "n": [1.9, 2.1]})
    for bars in (view, replace(view, log_y=True)):  # within two orders of magnitude, or not all above 0
        (axes,) = draw(bars, Style(["m", "n"])).axes
        bottom, _ = axes.get_ylim()
        assert axes.get_yscale() == "linear" and axes.get_ylabel() == "y"
        assert bottom == 0 if low >= 0 else bottom < low
        assert {patch.get_y() for patch in axes.patches} == {0}


def test_a_logarithmic_scale_is_named_and_shows_the_smallest_bar() -> None:
    view = Bars("t", y_label="loss", labels=["a", "b"], series={"m": [0.02, 18.0]}, log_y=True)
    (axes,) = draw(view, Style(["m"])).axes
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "loss (log scale)"
    assert axes.get_ylim()[0] <= 0.02 / 1.2


def test_a_group_whose_first_bars_are_missing_stands_above_its_label() -> None:
    view = Bars("t", y_label="y", labels=["a", "b"], series={"m": [None, 1.0], "n": [None, 1.0], "o": [1.0, 1.0]})
    (axes,) = draw(view, Style(["m", "n", "o"])).axes
    left, right = axes.get_xlim()
    assert left <= -0.5 and right >= 1.5


def test_few_bars_have_their_numbers() -> None:
    view = Bars("t", y_label="y", labels=["a", "b"], series={"m": [3.2551, None], "n": [3.3336, -0.0625]})
    found = [text.get_text() for text in draw(view, Style(["m", "n"])).axes[0].texts]
    assert found == ["3.255", "3.334", "-0.0625"]
    many = Bars("t", y_label="y", labels=list("abcdef"), series={"m": [0.0312] * 6, "n": [2.0] * 6, "o": [1.0] * 6})
    texts = draw(many, Style(["m", "n", "o"])).axes[0].texts
    assert len(texts) == 18 and {text.get_rotation() for text in texts} == {90}, "wider than their bars, on end"
    crowd = Bars("t", y_label="y", labels=list("abcdef") * 20, series={"m": [1.0] * 120, "n": [0.0] * 120})
    assert {text.get_text() for text in draw(crowd, Style(["m", "n"])).axes[0].texts} == {"0"}


def test_ids_of_two_figures_differ_and_text_is_not_mathematics() -> None:
    view = Lines("t", x_label="$x$ < 1", y_label="y", series={"a": [(1, 2), (2, 3)]})
    one, two = (svg(view, Style(["a"]), key) for key in ("one", "two"))
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    assert "$x$ &lt; 1" in one and "currentColor" in one and "#010203" not in one
    assert one == svg(view, Style(["a"]), "one")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (0.03125, "0.0312"), (12, "12"), (2048, "2,048"), (131072, "131.1k"), (1.5e6, "1.5M")],
)
def test_short_numbers(value: float | None, text: str) -> None:
    assert short(value) == text
