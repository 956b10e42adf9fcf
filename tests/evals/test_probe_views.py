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
            ["| name |      n | share |", "| one  | 12,345 | 0.250 |", "| two  |      – | 1.000 |", "A note."],
        ),
        (
            Bars(
                "By layer", y_label="error", labels=["layer 0", "layer 2"], series={"a": [0.5, None], "b": [1e-5, 2.0]}
            ),
            ["| error   |     a |     b |", "| layer 0 | 0.500 | 1e-05 |", "| layer 2 |     – | 2.000 |"],
        ),
        (
            HeatMap("Map", x_label="length", y_label="depth", x=["64", "128"], y=["0.5"], values=[[1.0, None]]),
            ["| depth \\ length |    64 | 128 |", "| 0.5            | 1.000 |   – |"],
        ),
        (
            Lines("Curve", x_label="tokens", y_label="nats", series={"a": [(1, 0.5), (2000, 0.25)], "b": [(1, 3.0)]}),
            ["| tokens |     a |     b |", "| 1      | 0.500 | 3.000 |", "| 2,000  | 0.250 |     – |"],
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


def test_many_curves_are_rows() -> None:
    series = {f"layer {i}": [(64.0, 0.5 * i), (128.0, 1.0)] for i in range(ROWS + 1)}
    lines = as_text(Lines("Curves", x_label="tokens", y_label="rms", series=series)).splitlines()
    assert lines[2] == "| tokens  |    64 |   128 |" and lines[-1] == "| layer 8 | 4.000 | 1.000 |"


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        ([0.25, 1.0, 1e-9], ["0.250", "1.000", "1e-09"]),
        ([0.0, 0.00337, -0.012], ["0.0000", "0.0034", "-0.0120"]),
        ([12.34567, 1.0], ["12.35", "1.00"]),
        ([123456.7, 3.0, None], ["123,457", "3", "–"]),
        ([0.0, 0.0], ["0", "0"]),
        ([2.5e-8], ["2e-08"]),
        (["0.5", 3000], ["0.5", "3,000"]),
    ],
)
def test_the_numbers_of_a_column_have_as_many_decimals(column: list, shown: list) -> None:
    table = Table("Cells", columns=["row", "x"], rows=[["", cell] for cell in column])
    assert [line.split("|")[2].strip() for line in as_text(table).splitlines()[4:]] == shown


def test_terminals_get_one_short_table_of_a_synthetic_task() -> None:
    def cell(length: int, depth: float, score: float | None) -> dict:
        return {"length": length, "depth": depth, "n": 4, "generated": score, "low": 0.0, "high": 1.0} | {
            "likelihood": score, "chance": 0.25, "nats": score
        }  # fmt: skip

    cells = [cell(length, depth, 0.5) for length in (512, 1024) for depth in (0.0, 1.0)]
    cells[3] = cell(1024, 1.0, None)
    settings = {"probe": {"type": "passkey"}, "result": {"axis": "depth", "cells": cells, "notes": ["a note"]}}
    models = {"teacher": Measurement(probes=[settings]), "student": Measurement(probes=[settings])}
    (brief,), _ = probe_views(models, trusted=False, brief=True)
    lines = as_text(brief).splitlines()
    assert lines[2].split("|")[1:4] == [" depth \\ tokens ", " teacher 512 ", " teacher 1,024 "]
    assert [text.strip() for text in lines[5].split("|")[1:-1]] == ["1.0", "50% / 50%", "–", "50% / 50%", "–"]
    assert lines[-1] == "Written / found likeliest of 4 questions; guessing finds 25%."
    assert len(probe_views(models, trusted=False)[0]) == 3, "pages have heat maps and all cells"


def probe(type_: str, result: dict, **settings) -> dict:
    return {"probe": {"type": type_, **settings}, "result": result}


def cells(facts: int, **changes) -> dict:
    cell = {"length": 64, "facts": facts, "n": 4, "generated": 0.5, "low": 0.25, "high": 0.75}
    cell |= {"likelihood": 1.0, "chance": 0.25, "nats": 1.5, **changes}
    return {"axis": "facts", "cells": [cell], "notes": []}


def test_probes_of_one_kind_say_by_what_they_differ():
    two = [probe("facts", cells(n), facts=[n], items=4) for n in (1, 8)]
    views, missing = probe_views({"m": Measurement(probes=two)}, trusted=False)
    titles = ["Facts at once: m (facts=[1])", "Facts at once (facts=[1])"]
    assert [view.title for view in views] == titles + [title.replace("[1]", "[8]") for title in titles]
    assert missing == []
    views, _ = probe_views({"m": Measurement(probes=two[:1])}, trusted=False)
    assert [view.title for view in views] == ["Facts at once: m", "Facts at once"]


def test_settings_that_an_older_version_did_not_have_count_as_their_defaults():
    old, new = probe("facts", cells(1), facts=[1]), probe("facts", cells(1), facts=[1], just_read_twice=False)
    views, _ = probe_views({"a": Measurement(probes=[old]), "b": Measurement(probes=[new])}, trusted=False)
    assert [row[0] for row in views[-1].rows] == ["a", "b"]


@pytest.mark.parametrize(
    ("result", "why"),
    [
        ({"axis": "facts", "cells": [{"length": 64, "facts": 1, "n": 4}], "notes": []}, "it has no 'generated'"),
        (cells(1, generated="all"), "ValueError"),
        (cells(1, nats="many") | {"cells": "many"}, "TypeError"),
    ],
)
def test_a_result_of_another_version_spares_those_of_other_models(result, why):
    taken = {"old": result, "new": cells(1)}
    found = {name: Measurement(probes=[probe("facts", r, facts=[1])]) for name, r in taken.items()}
    views, (missing,) = probe_views(found, trusted=False)
    assert [view.title for view in views] == ["Facts at once: new", "Facts at once"]
    assert missing.startswith("the probe facts of old was measured, but cannot be shown") and why in missing


def test_views_that_are_no_numbers_are_found_before_they_are_drawn():
    buckets = [{"first": 1, "end": 16, "kl": "high", "same": 0.25}]
    views, (missing,) = probe_views(
        {"m": Measurement(probes=[probe("kl_by_position", {"length": 16, "buckets": buckets})])}, trusted=False
    )
    assert views == [] and "series.m" in missing


def test_many_models_share_a_map():
    asked = {f"m{i}": Measurement(probes=[probe("facts", cells(1, generated=i / 8), facts=[1])]) for i in range(8)}
    overview, table = probe_views(asked, trusted=False)[0]
    assert isinstance(overview, HeatMap) and overview.y == list(asked) and overview.x == ["64/1"]
    assert [row[0] for row in overview.values] == [12.5 * i for i in range(8)] and len(table.rows) == 8


def test_a_probe_from_outside_is_not_imported_for_a_look():
    found = Measurement(probes=[{"probe": {"type": "nowhere_to_be_found:Probe"}, "result": {}}])
    views, missing = probe_views({"model": found}, trusted=False)
    assert views == [] and "nowhere_to_be_found:Probe" in missing[0]
