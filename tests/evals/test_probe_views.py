"""Views as text."""

import pytest

from linearize.evals.measure import Measurement
from linearize.evals.probe_views import ROWS, as_text, probe_views
from linearize.evals.views import Bars, HeatMap, Lines, Table


@pytest.mark.parametrize(
    ("view", "rows"),
    [
        (
            Table("Cells", "A note.", columns=["name", "n", "share"], rows=[["one", 12345, 0.25], ["two", None, 1.0]]),
            ["| name |      n | share |", "| one  | 12,345 |  0.25 |", "| two  |      – |     1 |", "A note."],
        ),
        (
            Bars(
                "By layer", y_label="error", labels=["layer 0", "layer 2"], series={"a": [0.5, None], "b": [1e-5, 2.0]}
            ),
            ["| error   |   a |     b |", "| layer 0 | 0.5 | 1e-05 |", "| layer 2 |   – |     2 |"],
        ),
        (
            HeatMap("Map", x_label="length", y_label="depth", x=["64", "128"], y=["0.5"], values=[[1.0, None]]),
            ["| depth \\ length |  64 | 128 |", "| 0.5            |   1 |   – |"],
        ),
        (
            Lines("Curve", x_label="tokens", y_label="nats", series={"a": [(1, 0.5), (2000, 0.25)], "b": [(1, 3.0)]}),
            ["| tokens |    a |   b |", "| 1      |  0.5 |   3 |", "| 2,000  | 0.25 |   – |"],
        ),
        (Lines("Nothing", x_label="x", y_label="y", series={}), ["nothing was measured"]),
    ],
)
def test_every_kind_of_view_is_a_table(view, rows):
    text = as_text(view)
    assert text.splitlines()[0] == view.title
    assert set(rows) <= set(text.splitlines())


def test_long_curves_are_thinned_and_keep_their_ends():
    points = [(float(x), x / 100) for x in range(100)]
    text = as_text(Lines("Curve", x_label="x", y_label="y", series={"a": points}))
    cells = [line.split("|")[1].strip() for line in text.splitlines()[4:]]
    assert len(cells) == ROWS and (cells[0], cells[-1]) == ("0", "99")


def test_a_probe_from_outside_is_not_imported_for_a_look():
    found = Measurement(probes=[{"probe": {"type": "nowhere_to_be_found:Probe"}, "result": {}}])
    views, missing = probe_views({"model": found}, trusted=False)
    assert views == [] and "nowhere_to_be_found:Probe" in missing[0]
