"""What evaluations were taken with stands beside them, and where it differs, a warning."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from left import evaluation, folder

from linearize.cli.main import main
from linearize.evals.items import Items
from linearize.evals.measure import Measurement
from linearize.report.conditions import differences, line, of_conversion, of_report, table
from linearize.report.page import write_page
from linearize.report.sources import read_sources

SETTINGS: dict[str, Any] = {
    "text": "novels.txt",
    "split": "dev",
    "windows": 64,
    "recall_items": 32,
    "limit": 100,
    "num_fewshot": None,
    "batch_size": 4,
    "text_tokens": 12345,
}


def evaluated(path: Path, model: str, **changes: Any) -> Path:
    values = json.loads(evaluation(path, model).read_text())
    dtype = changes.pop("dtype", "torch.float32")
    values |= {"settings": {**SETTINGS, **changes}, "environment": {"dtype": dtype, "device": "cpu"}}
    path.write_text(json.dumps(values))
    return path


def test_what_an_evaluation_was_taken_with(tmp_path: Path) -> None:
    (report,) = read_sources([evaluated(tmp_path / "e.json", "gdn")]).evaluations.values()
    told = of_report(report)
    assert told == {
        "text": "novels.txt",
        "split": "dev",
        "tokens of text": "12,345",
        "lengths": "32, 64",
        "windows a length": "64",
        "questions a recall case": "32",
        "questions a task": "100",
        "examples in prompts": "the task's",
        "dtype": "float32",
        "batch size": "4",
        "device": "cpu",
    }
    assert line(told).startswith("text novels.txt, split dev, tokens of text 12,345, lengths 32 and 64, windows")


def test_a_conversion_was_measured_as_its_recipe_says(tmp_path: Path) -> None:
    made = folder(tmp_path / "gdn")
    recipe = "data: {source: news}\nevaluation: {text: null, split: dev, windows: 3, recall_items: 8, batch_size: 2}\n"
    (made / "run" / "recipe.yaml").write_text(recipe)
    (model,) = read_sources([made]).models
    told = of_conversion(model.conversion)
    assert (told["text"], told["windows a length"], told["questions a recall case"]) == ("news", "3", "8")
    assert told["dtype"] == "float32" and "questions a task" not in told


def test_rows_are_shared_by_those_that_are_alike() -> None:
    alike = {f"m{i}": {"text": "a", "windows": "2"} for i in range(6)}
    view = table("t", alike)
    assert view is not None and view.rows == [["all 6", "a", "2"]]
    view = table("t", {**alike, "other": {"text": "b"}})
    assert view is not None and view.rows == [["the other 6", "a", "2"], ["other", "b", "–"]]
    view = table("t", {"one": {"text": "a"}, "two": {"text": "a"}})
    assert view is not None and view.rows == [["one, two", "a"]]
    assert table("t", {}) is None and table("t", {"m": {}}) is None


def test_differences_name_the_values_and_who_has_them() -> None:
    told = {"a": {"text": "x", "batch size": "1"}, "b": {"text": "y", "batch size": "2"}, "c": {"text": "x"}, "d": {}}
    assert differences(told, {}) == ["text: x (a, c); y (b)"]
    items = {name: {"piqa": Items("acc", "10", documents=digest)} for name, digest in (("a", "1"), ("b", "2"))}
    measured = {name: Measurement(items=found) for name, found in items.items()}
    assert differences({}, measured) == ["questions of piqa: set 1 of 2 (a); set 2 of 2 (b)"]
    many = {f"m{i}": {"dtype": "float32"} for i in range(6)} | {"n": {"dtype": "bfloat16"}}
    assert differences(many, {}) == ["dtype: float32 (m0, m1, m2 and 3 more); bfloat16 (n)"]


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        ({}, None),
        ({"batch_size": 8}, None),
        ({"text": "news"}, "text: novels.txt (a); news (b)"),
        ({"windows": 8}, "windows a length: 64 (a); 8 (b)"),
        ({"limit": None}, "questions a task: 100 (a); all (b)"),
        ({"dtype": "torch.bfloat16"}, "dtype: float32 (a); bfloat16 (b)"),
    ],
)
def test_the_page_and_the_command_warn(
    change: dict[str, Any], warned: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [evaluated(tmp_path / "a.json", "a"), evaluated(tmp_path / "b.json", "b", **change)]
    assert main(["report", *map(str, files), "--html", "none"]) == 0
    printed = capsys.readouterr()
    assert ("not measured alike" in printed.err) == (warned is not None)
    assert "a, measured with text novels.txt, split dev" in printed.out
    if warned is not None:
        assert f"not measured alike: {warned}" in printed.err
        text = write_page(files, tmp_path / "page.html")[0].read_text()
        assert 'class="warn"' in text and warned in text and "Measured with" in text and "novels.txt" in text
        assert "Lengths and windows are those of losses and KL; probes have their own." in text


def test_many_evaluations_are_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [evaluated(tmp_path / f"{i}.json", f"m{i}") for i in range(6)]
    assert main(["report", *map(str, files), "--html", "none"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| loss 32 |") == 1 and "| m5 " in printed and "KL to the teacher by position" not in printed


OWN = """
from linearize.evals.probes.base import Probe
from linearize.evals.views import Table
class Own(Probe):
    @classmethod
    def views(cls, results):
        return [Table("Mine", columns=["model"], rows=[[name] for name in results])]
"""


def test_trust_shows_a_probe_of_ones_own_in_the_terminal_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = evaluation(tmp_path / "e.json", "gdn")
    path.write_text(path.read_text().replace("kl_by_position", "own_probe_of_a_test:Own"))
    (tmp_path / "own_probe_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    command = ["report", str(path), "--html", "none"]
    try:
        assert main(command) == 0
        printed = capsys.readouterr()
        assert "Mine" not in printed.out and "give --trust-remote-code" in printed.err
        assert main([*command, "--trust-remote-code"]) == 0
        printed = capsys.readouterr()
        assert "Mine" in printed.out and printed.err == ""
    finally:
        sys.modules.pop("own_probe_of_a_test", None)
