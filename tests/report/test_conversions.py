"""`linearize report` reads what conversions left, one row each, and refuses folders that hold nothing of the kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from left import folder
from trainable import make_recipe, write_source

from linearize.errors import UserError
from linearize.pipeline import convert
from linearize.preflight import plan_of
from linearize.report.conversions import facts_of, report, to_json

EVALUATION = {"windows": 2, "recall": False, "batch_size": 2, "split": "train", "lengths": [16, 32]}


@pytest.fixture
def folders(
    pico_model: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Path]:
    """A calibrated gdn, and a lolcats with its two stages."""
    monkeypatch.setattr("linearize.data.dataset.HF_HOME", str(tmp_path / "hf"))
    write_source(tmp_path, pico_model(), pico_tokenizer)
    made = []
    for name, changes in (
        ("gdn", {"mixer": "gdn", "init": {"type": "calibrated", "tokens": 64}, "stages": []}),
        ("lolcats", {}),
    ):
        recipe = make_recipe(tmp_path, evaluation=EVALUATION, **changes)
        made.append(convert(recipe, tmp_path / name, say=lambda text: None))
    return made


def cells(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]


def test_one_row_per_conversion_with_its_numbers(folders: list[Path]) -> None:
    text = report(folders)
    header, _, gdn, lolcats = cells(text)
    steps = [name.removeprefix("loss 16 ") for name in header if name.startswith("loss 16 ")]
    assert steps == ["untrained", "calibrated", "after attention_transfer", "after finetune"]
    for row, place in ((gdn, folders[0]), (lolcats, folders[1])):
        points = dict(json.loads((place / "run" / "measurements.json").read_text()))
        assert row[0] == place.name and row[1] == place.name
        for step in steps:
            shown = row[header.index(f"loss 16 {step}")]
            assert shown == (f"{points[step]['losses'][0]['loss']:.3f}" if step in points else "–")
        last = list(points.values())[-1]
        gap = last["losses"][1]["loss"] - points["teacher"]["losses"][1]["loss"]
        assert row[header.index("gap 32")] == f"{gap:+.3f}"
        assert row[header.index("KL 32")] == f"{last['divergence'][1]['kl']:.3f}"
    assert gdn[header.index("gap 16, linear off")] == "–" != lolcats[header.index("gap 16, linear off")]
    assert text.count("Teacher ") == 1


def test_lengths_stand_in_order_and_steps_are_compared_at_one_that_all_have(tmp_path: Path) -> None:
    first, second = folder(tmp_path / "auto", architecture="delta rule"), folder(tmp_path / "gdn", architecture="gdn")
    path = first / "run" / "measurements.json"
    points = json.loads(path.read_text())
    for _, values in points:
        values["losses"] = values["losses"][1:]
    path.write_text(json.dumps(points))
    text = report([first, second])
    header = cells(text)[0]
    assert [name for name in header if name.startswith("gap") and "off" not in name] == ["gap 32", "gap 64"]
    assert "loss 64 untrained" in header and "loss 32 untrained" not in header
    assert "\n\nMixer of auto: delta rule\n" in text and "Mixer of gdn" not in text


def test_facts_are_the_plans(folders: list[Path], tmp_path: Path) -> None:
    to_json(folders, tmp_path / "deep" / "report.json")
    data: list[dict[str, Any]] = json.loads((tmp_path / "deep" / "report.json").read_text())
    plan = plan_of(make_recipe(folders[0].parent, mixer="gdn", stages=[], evaluation=None))
    assert {key: data[0][key] for key in facts_of(plan)} == json.loads(json.dumps(facts_of(plan)))
    assert list(data[0]["points"]) == ["teacher", "untrained", "calibrated"]


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no run/plan.json; give folders that `linearize convert` wrote"):
        report([tmp_path])
