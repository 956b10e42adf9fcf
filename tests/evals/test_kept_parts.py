"""A stopped evaluation goes on from its finished parts, and only an evaluation of the same things does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from linearize.errors import UserError
from linearize.evals import measure as measuring
from linearize.evals.evaluate import evaluate
from linearize.evals.measurement import Measurement
from linearize.evals.parts import Parts, files_made_of, model_made_of, named_files
from linearize.evals.report import Report
from linearize.evals.text import TextLoss

SETTINGS: dict[str, Any] = {"windows": 2, "lengths": [32], "recall": [(1, 30)], "recall_items": 2, "device": "cpu"}
SETTINGS |= {"probes": ["kl_by_position", {"type": "mqar", "pairs": 4, "queries": 1, "lengths": [400], "items": 1}]}
PARTS = ["losses", "divergence from the teacher", "branches", "recall", "probe kl_by_position", "probe mqar"]
OF_THE_STUDENT = [f"student: {part}" for part in PARTS]
OF_THE_TEACHER = [f"teacher: {part}" for part in ("losses", "recall", "probe mqar")]
REUSED = ": taken over from the run before"


@pytest.fixture
def student(converted: Any, pico_model: Any, pico_tokenizer: Any, tmp_path: Path) -> Path:
    """A checkpoint whose recipe names its source."""
    source, folder, text = tmp_path / "source", tmp_path / "student", tmp_path / "held.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(900)))
    for place, model in ((source, pico_model()), (folder, converted("lolcats"))):
        model.save_pretrained(place)
        pico_tokenizer.save_pretrained(place)
    (folder / "recipe.yaml").write_text(
        f"model: {{name: {source}}}\ndata: {{seq_len: 32}}\nevaluation: {{text: {text}}}\n"
    )
    return folder


def stop_at(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the evaluation when that part is to be taken."""
    taken = measuring._taken

    def until(work: Any, take: Any, say: Any) -> Measurement:
        if work.name == part:
            raise KeyboardInterrupt
        return taken(work, take, say)

    monkeypatch.setattr(measuring, "_taken", until)


def run(folder: Path, output: Path | None, **changes: Any) -> tuple[Report, list[str]]:
    """The report, and what was said but for the plan."""
    said: list[str] = []
    report = evaluate(folder, output=output, say=said.append, **{**SETTINGS, **changes})
    return report, [line.removeprefix("measuring ") for line in said if not line.startswith("to be measured")]


@pytest.mark.parametrize(("part", "name"), [("recall", "evaluated.json"), ("probe mqar", "tokenizer-evaluated.json")])
def test_a_stopped_evaluation_goes_on_and_gives_the_same(
    part: str, name: str, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = student / name  # reports may lie in the folder of the model
    whole, said = run(student, None)
    assert said == [*OF_THE_STUDENT, *OF_THE_TEACHER]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(part, patch)
        run(student, output)
    assert not output.exists()
    done = OF_THE_STUDENT[: PARTS.index(part)]
    (student / "timed.json").write_text("{}")
    found, said = run(student, output, batch_size=1)
    assert said == [*(name + REUSED for name in done), *OF_THE_STUDENT[len(done) :], *OF_THE_TEACHER]
    assert found.student.recall == whole.student.recall and found.student.notes == whole.student.notes
    assert found.student.losses == whole.student.losses and found.teacher == whole.teacher
    assert found.student.probes == json.loads(json.dumps(whole.student.probes))
    assert Report.from_json(output) == found
    assert [path.name for path in student.glob("*evaluated*")] == [name], "nothing is left behind"


def test_two_evaluations_cannot_write_one_report(student: Path, tmp_path: Path) -> None:
    """The first is another process, which is killed at the end."""
    output, alive = tmp_path / "report.json", tmp_path / "alive"
    output.write_text("the report of the day before")
    code = "import pathlib, sys, time; from linearize.evals.parts import held_report\n"
    code += "with held_report(sys.argv[1]): pathlib.Path(sys.argv[2]).touch(); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", code, str(output), str(alive)])
    try:
        while not alive.exists():
            assert other.poll() is None
            time.sleep(0.1)
        with pytest.raises(UserError, match="report.json is in use by another running evaluation; wait for it"):
            run(student, output)
        assert output.read_text() == "the report of the day before"
    finally:
        other.kill()
        other.wait()
    report, _ = run(student, output, probes=[])
    assert Report.from_json(output) == report
    assert [path.name for path in tmp_path.iterdir() if "report" in path.name] == ["report.json"], (
        "nothing is left behind"
    )


def test_what_was_taken_on_the_teacher_too_is_taken_over(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = measuring._taken
    count = iter(range(100))
    monkeypatch.setattr(measuring, "_taken", lambda *how: before(*how) if next(count) < 7 else pytest.exit("stopped"))
    with pytest.raises(pytest.exit.Exception):
        run(student, tmp_path / "report.json")
    monkeypatch.setattr(measuring, "_taken", before)
    _, said = run(student, tmp_path / "report.json")
    assert [line for line in said if line.endswith(REUSED)] == [n + REUSED for n in OF_THE_STUDENT + OF_THE_TEACHER[:1]]


@pytest.mark.parametrize("change", ["settings", "text", "model", "teacher", "questions"])
def test_anything_else_starts_anew_and_says_why(
    change: str, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, changes = tmp_path / "report.json", {}
    questions = tmp_path / "options.jsonl"
    questions.write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n')
    probes = [*SETTINGS["probes"], {"type": "option_permutation", "questions": str(questions)}]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at("branches", patch)
        run(student, output, probes=probes)
    if change == "settings":
        changes = {"windows": 3}
    elif change == "text":
        held = tmp_path / "held.txt"
        held.write_text(held.read_text()[::-1])
    elif change == "questions":
        questions.write_text(questions.read_text() * 2)
    else:
        weights = (student if change == "model" else tmp_path / "source") / "model.safetensors"
        stat = weights.stat()
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    _, said = run(student, output, probes=probes, **changes)
    assert not any(line.endswith(REUSED) for line in said)
    key = {"settings": "settings.windows: 2, now 3", "questions": "files.0"}.get(change, f"({change}")
    assert said[0].startswith(f"{output}.parts is of another evaluation") and key in said[0]


def test_a_damaged_file_is_not_used(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "report.json.parts").write_text('{"made_of": {}, "do')
    assert Parts(tmp_path / "report.json", {}, said.append).done == {}
    assert said == [f"{tmp_path / 'report.json.parts'} cannot be read and is not used"]


def test_only_texts_that_are_paths_of_files_are_taken_for_files(tmp_path: Path) -> None:
    (questions := tmp_path / "q.jsonl").write_text("{}")
    texts = ["It was a dark night. " * 30, "~nobody-of-this-name/x", "nul\0", str(questions), str(tmp_path)]
    assert named_files([{"type": "mine", "prompts": texts}]) == [questions]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("model: 3", "damaged: model must hold keys, got 3"),
        ("data: [1]", "damaged: data must hold keys"),
        ("data: {seq_len: x}", "data.seq_len: 'x' is not a count"),
        ("evaluation: 3", "damaged: evaluation must hold keys"),
    ],
)
def test_a_damaged_recipe_is_told(student: Path, recipe: str, message: str) -> None:
    (student / "recipe.yaml").write_text(recipe)
    with pytest.raises(UserError, match=f"recipe.yaml of .*{message}"):
        run(student, None, teacher=False)


def test_a_tokenizer_with_more_tokens_than_the_model_is_told(
    converted: Any, pico_model: Any, pico_tokenizer: Any, tmp_path: Path
) -> None:
    model = pico_model(vocab_size=40)
    model.save_pretrained(tmp_path / "small")
    pico_tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match=r"writes token \d+, and the model knows 40"):
        run(tmp_path / "small", None, teacher=False)


def test_a_place_for_the_parts_is_needed_before_any_work(student: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json.parts").mkdir()
    with pytest.raises(UserError, match=r"report\.json\.parts is a folder"):
        run(student, tmp_path / "report.json")


def test_parts_that_are_no_numbers_come_back_as_such(tmp_path: Path) -> None:
    broken = Measurement(losses=[TextLoss(8, float("nan"), 7, 1, ((1, 8, float("inf")),))])
    Parts(tmp_path / "r.json", {"a": (1, 2)}, print).take("losses", lambda: broken)
    again = Parts(tmp_path / "r.json", {"a": [1, 2]}, print).take("losses", pytest.fail)
    (point,) = again.losses
    assert point.loss != point.loss and point.by_position[0][2] != point.by_position[0][2] and point.tokens == 7


def test_a_model_is_told_by_its_files_and_not_by_reports(student: Path) -> None:
    before = model_made_of(str(student))
    names = ["report.json", "my-token.json", "my-token.json.parts", "vocab.parts", "tokenizer.json.parts"]
    for name in [*names, ".tokenizer.json.parts.partial", "model.safetensors.json.parts"]:
        (student / name).write_text("{}")
        assert model_made_of(str(student)) == before, name
    (student / "tokenizer_config.json").write_text("{}")
    assert (changed := model_made_of(str(student))) != before
    torch.save({}, student / "model.safetensors")
    assert model_made_of(str(student)) != changed


def test_a_report_among_the_questions_does_not_change_what_they_are(tmp_path: Path) -> None:
    (questions := tmp_path / "copa.jsonl").write_text("{}")
    before = files_made_of(tmp_path.rglob("*"))
    (tmp_path / "copa.json.parts").write_text("{}")
    assert files_made_of(tmp_path.rglob("*")) == before and [Path(path) for path, *_ in before] == [questions]
