"""How wide the tables of a page are in a browser, on a screen and on a telephone."""

from __future__ import annotations

import json
import re
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest
from left import BROWSER, folder

from linearize.evals.views import Table
from linearize.report.html import table
from linearize.report.page import write_page

MEASURE = """<script>onload = () => {
  const page = document.querySelector("iframe").contentDocument, told = {wide: page.documentElement.scrollWidth};
  told.boxes = [...page.querySelectorAll(".scroll > table")].map(table => ({
    title: table.closest("section").querySelector("h2").textContent,
    over: table.parentElement.scrollWidth - table.parentElement.clientWidth,
    inside: getComputedStyle(table.parentElement).overflowX,
    shade: getComputedStyle(table.parentElement).backgroundImage,
    head: [...table.querySelectorAll("th")].map(cell => cell.textContent),
  }));
  document.body.textContent = JSON.stringify(told);
}</script>"""
"""Says how wide a page in a frame is, and by how much its tables are wider than their boxes."""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on the path to open the page in")
@pytest.mark.parametrize("models", [1, 3])
def test_tables_fit_the_screen_or_scroll_in_their_box(models: int, tmp_path: Path) -> None:
    """At 1,280 pixels all of the summary and of the steps is seen, at 390 all of a sample's text."""
    what = "delta rule on hedgehog features beside a softmax window of 64 tokens"
    folders = [folder(tmp_path / f"demo-auto_{i}", loss=3 + i / 10, architecture=what) for i in range(models)]
    for path in folders:
        _richer(path / "run" / "measurements.json")
    page, _ = write_page(folders, tmp_path / "page.html")
    for width in (1280, 390):
        told = _measured(page, width, tmp_path)
        assert told["wide"] <= width, "the page itself does not scroll sideways"
        assert all(box["inside"] == "auto" and "gradient" in box["shade"] for box in told["boxes"])
        samples = [box for box in told["boxes"] if "continuation" in box["head"]]
        summary = next(box for box in told["boxes"] if box["title"] == "Summary")
        assert len(samples) == 1 and samples[0]["over"] <= 0
        assert summary["head"] == ["", "teacher", *(path.name for path in folders)]
        if width == 390:
            assert summary["over"] <= 0 if models == 1 else summary["over"] > 0
        else:
            assert [box for box in told["boxes"] if box["over"] > 0] == []


def _richer(path: Path) -> None:
    """As many measurements as a recipe usually asks for, and a sample as long as usual."""
    points = json.loads(path.read_text())
    for name, values in points:
        values["recall"] = [{**values["recall"][0], "facts": n, "distance": n * 200} for n in (1, 2, 4, 8, 9)]
        values["losses"] = [{**values["losses"][0], "length": n} for n in (32, 64, 1024, 2048)]
        for key in ("branches", "divergence"):
            values[key] = [{**found, "length": n} for found in values[key] for n in (32, 64, 1024, 2048)]
        if name.startswith("after"):
            values["sample"] = "It was a letter from Margaret, who had been thinking of it all the time. " * 4
    path.write_text(json.dumps(points))


def _measured(page: Path, width: int, at: Path) -> dict:
    """What `MEASURE` says of the page in a window of that width, without the policy that forbids all scripts."""
    assert BROWSER is not None
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text())
    frame = f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{escape(text)}"></iframe>'
    (at / "frame.html").write_text(f"<!DOCTYPE html><meta charset=utf-8>{MEASURE}<body>{frame}")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", "--dump-dom"]
    command += [f"--user-data-dir={at / 'profile'}", (at / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(unescape(done.stdout.partition("<body>")[2].partition("</body>")[0]))


def test_a_table_is_turned_only_where_it_is_wide_and_its_rows_have_names() -> None:
    wide = Table("t", columns=["", *(f"column {i}" for i in range(30))], rows=[["a", *range(30)], ["b", *range(30)]])
    assert table(wide).count("<tr>") == 31 and '<th scope="col">a</th>' in table(wide)
    long = Table("t", columns=wide.columns, rows=[[str(i), *range(30)] for i in range(40)])
    twice = Table("t", columns=wide.columns, rows=[wide.rows[0], wide.rows[0]])
    brief = Table("t", columns=["", "x", "y"], rows=[["a", 1, 2], ["b", 3, 4]])
    assert [table(view).count("<tr>") for view in (long, twice, brief)] == [41, 3, 3]
