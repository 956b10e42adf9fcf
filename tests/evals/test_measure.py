"""Measurements of a live model, the trip through JSON, and the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from linearize.data import DataConfig
from linearize.errors import UserError
from linearize.evals.config import EvalConfig
from linearize.evals.held_out import eval_tokens
from linearize.evals.measure import Measurement, measure
from linearize.evals.probes.base import Probe
from linearize.evals.table import PROMPT, comparison_table, grid, shown_prompt, side_by_side
from linearize.evals.text import BranchLoss, loss_on_text
from linearize.swap import teacher_path

TEXT = torch.randint(2, 97, (1000,), generator=torch.Generator().manual_seed(0))
CONFIG = EvalConfig.model_validate(
    {"lengths": [50, 100], "windows": 4, "recall": [[1, 30], [1, 900]], "recall_items": 3, "sample_tokens": 7}
    | {"sample_prompt": "abc"}
)


@pytest.fixture
def measured(converted, pico_tokenizer):
    return measure(converted("lolcats"), pico_tokenizer, CONFIG, token_ids=TEXT, seq_len=64)


def test_everything_asked_for_is_measured(measured, converted):
    assert measured.loss(100) == loss_on_text(converted("lolcats"), TEXT, length=100, windows=4).loss
    assert [(b.branch, b.length) for b in measured.branches] == [
        (branch, length) for branch in ("linear", "window") for length in (50, 100)
    ]
    assert [(r.facts, r.distance, r.n) for r in measured.recall] == [(1, 30, 3), (1, 900, 0)]
    assert measured.prompt == "abc" and 0 < len(measured.sample) <= 7
    assert any("900 tokens was not asked" in note for note in measured.notes)


def test_length_defaults_to_the_training_length(converted, pico_tokenizer):
    config = EvalConfig.model_validate({"recall": False, "branches": False, "windows": 1})
    found = measure(converted("hedgehog"), pico_tokenizer, config, token_ids=TEXT, seq_len=64)
    assert [point.length for point in found.losses] == [64]
    assert found.recall == [] and found.branches == [] and found.sample is None


def test_the_teacher_path_measures_the_source_model(converted, pico_model, pico_tokenizer):
    model = converted("lolcats", "LSL")
    config = EvalConfig.model_validate({"recall": [[1, 30]], "recall_items": 2, "windows": 2})
    with teacher_path(model):
        as_teacher = measure(model, pico_tokenizer, config, token_ids=TEXT, seq_len=64)
    source = measure(pico_model(), pico_tokenizer, config, token_ids=TEXT, seq_len=64)
    assert as_teacher == source
    assert as_teacher.branches == []


def test_json_and_back(measured):
    assert Measurement.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


class Odd(Probe):
    """A probe of an author's own."""

    found: Any = None

    def run(self, subject: Any) -> Any:
        return self.found


@pytest.mark.parametrize("found", [3, None, [1], {"x": torch.ones(1)}])
def test_what_a_probe_of_ones_own_finds_is_plain_data(found, converted, pico_tokenizer, monkeypatch):
    monkeypatch.setattr(Odd, "found", found)
    config = EvalConfig.model_validate(
        {"windows": 1, "lengths": [50], "recall": False, "branches": False, "probes": [f"{__name__}:Odd"]}
    )
    with pytest.raises(UserError, match=":Odd: run gave .*, and must give a dict of plain data"):
        measure(converted("lolcats"), pico_tokenizer, config, token_ids=TEXT, seq_len=64)


def test_unknown_keys_are_errors():
    with pytest.raises(ValidationError, match="recal"):
        EvalConfig.model_validate({"recal": True})


def test_eval_tokens_reads_documents_in_order(tmp_path, pico_tokenizer):
    path = tmp_path / "held.jsonl"
    path.write_text('{"text": "abc"}\n{"text": "de"}\n')
    config = EvalConfig.model_validate({"text": str(path)})
    ids = eval_tokens(config, pico_tokenizer)
    expected = [*pico_tokenizer("abc")["input_ids"], 1, *pico_tokenizer("de")["input_ids"], 1]
    assert ids.tolist() == expected


def test_training_text_is_never_taken_for_held_out_text(tmp_path, pico_tokenizer):
    path = tmp_path / "training.jsonl"
    path.write_text('{"text": "abc"}\n')
    data = DataConfig.model_validate({"source": str(path)})
    with pytest.raises(UserError, match=r"no evaluation text: .*Set evaluation\.text"):
        eval_tokens(EvalConfig(), pico_tokenizer, data)


def shifted(measurement: Measurement, by: float) -> Measurement:
    values = measurement.to_dict()
    for point in values["losses"]:
        point["loss"] += by
    return Measurement.from_dict({**values, "branches": [], "tokens": 0})


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_comparison_table_has_a_row_per_point_with_gaps_to_the_teacher(measured):
    measured.branches = [BranchLoss("linear", 100, 9.5)]
    measured.tokens, measured.seconds = 1_500_000, 12.4
    table = comparison_table([("teacher", shifted(measured, -0.25)), ("after finetune", measured)])
    header, _, teacher, student = (cells(line) for line in table.splitlines()[:4])
    row = dict(zip(header, student, strict=True))
    assert header[:5] == ["", "loss 50", "gap", "loss 100", "gap"]
    assert student[1:5] == [f"{measured.loss(50):.3f}", "+0.250", f"{measured.loss(100):.3f}", "+0.250"]
    assert teacher[2] == "–" and row["loss 100, linear off"] == "9.500"
    assert (row["tokens so far"], row["training s"], row["1 fact/900"]) == ("1,500,000", "12", "–")
    assert "Note: recall of 1 fact(s) over 900" in table


def test_markdown_shows_continuations_line_by_line_and_as_they_were_written(measured):
    wild = replace(measured, prompt="*abc*", sample="# <b>no\n\n_heading_")
    table = comparison_table([("teacher", wild), ("after finetune", wild)])
    block = table.partition("\n\n")[2].partition("\n\nNote:")[0].splitlines()
    assert block == [
        "    Continuations of '*abc*':",
        "    teacher         # <b>no _heading_",
        "    after finetune  # <b>no _heading_",
    ]


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("It was late, and", "It was late, and"),
        ("x " * (PROMPT // 2), "x " * (PROMPT // 2)),
        ("word " * PROMPT + "she saw that", "… " + "word " * ((PROMPT - 12) // 5) + "she saw that"),
        ("x" * PROMPT + "y", "… " + "x" * (PROMPT - 1) + "y"),
    ],
)
def test_of_a_long_prompt_the_last_words_are_shown(prompt: str, shown: str) -> None:
    assert shown_prompt(prompt) == shown and len(shown) <= PROMPT + 2


def test_side_by_side_shows_the_difference_then_the_branches(measured):
    lines = side_by_side(measured, shifted(measured, -0.25)).split("\n\n")[0].splitlines()
    assert cells(lines[0]) == ["", "teacher", "student", "difference"]
    assert cells(lines[2])[0] == "loss 50" and cells(lines[2])[3] == "+0.250"
    names = [f"loss {n}, {what}" for n in (50, 100) for what in ("window off", "rise by window off")]
    assert [cells(line)[0] for line in lines[-4:]] == names
    off = measured.branch_loss("window", 100)
    assert cells(lines[-2])[1:] == ["–", f"{off:.3f}", "–"], "the teacher has no such branch"
    assert cells(lines[-1])[2] == f"{off - measured.loss(100):.3f}"
    alone = side_by_side(measured, None).splitlines()
    assert cells(alone[0]) == ["", "model"]
    assert cells(alone[-1])[0].startswith("Note") or len(cells(alone[2])) == 2


def test_grid_is_aligned_markdown():
    assert grid(["", "x"], [["name", "1.5"], ["n", "10"]]).splitlines() == [
        "|      |   x |",
        "|------|----:|",
        "| name | 1.5 |",
        "| n    |  10 |",
    ]
