"""Evaluating checkpoints from disk: teacher from the recipe, the report and its files."""

from __future__ import annotations

import json
import re

import pytest

from linearize.errors import UserError
from linearize.evals.evaluate import evaluate
from linearize.evals.items import Asked
from linearize.evals.report import Report
from linearize.evals.text import loss_on_text
from linearize.hf.load import load

QUICK = {"windows": 2, "recall": [(1, 30)], "recall_items": 2}


@pytest.fixture
def folders(converted, pico_model, pico_tokenizer, tmp_path):
    """A converted checkpoint, the model it comes from, and 600 characters of text."""
    source, student, text = tmp_path / "source", tmp_path / "student", tmp_path / "held.jsonl"
    text.write_text(json.dumps({"text": "".join(chr(97 + i * i % 26) for i in range(600))}) + "\n")
    for folder, model in ((source, pico_model()), (student, converted("lolcats"))):
        model.save_pretrained(folder)
        pico_tokenizer.save_pretrained(folder)
    recipe = f"model: {{name: {source}}}\ndata: {{seq_len: 64}}\nevaluation: {{text: {text}}}\n"
    (student / "recipe.yaml").write_text(recipe)
    return source, student, text


def test_a_converted_checkpoint_is_compared_with_its_source(folders, tmp_path, converted, pico_model):
    source, student, _ = folders
    report = evaluate(student, output=tmp_path / "new" / "report.json", device="cpu", **QUICK)
    assert report.teacher_model == str(source)
    assert [point.length for point in report.student.losses] == [64, 128]
    ids = read(folders)
    assert report.student.loss(128) == loss_on_text(converted("lolcats"), ids, length=128, windows=2).loss
    assert report.teacher.loss(128) == loss_on_text(pico_model(), ids, length=128, windows=2).loss
    assert {b.branch for b in report.student.branches} == {"linear", "window"}
    assert Report.from_json(tmp_path / "new" / "report.json") == report
    difference = report.student.loss(128) - report.teacher.loss(128)
    row = next(line for line in report.table().splitlines() if line.startswith("| loss 128 "))
    assert row.split("|")[-2].strip() == f"{difference:+.3f}"


def test_the_teacher_is_measured_in_the_type_of_the_student(folders, pico_model):
    source, student, _ = folders
    pico_model().bfloat16().save_pretrained(source)
    rounded, _ = load(source, dtype="float32")
    loss = loss_on_text(rounded, read(folders), length=128, windows=2).loss
    assert evaluate(student, device="cpu", **QUICK).teacher.loss(128) == loss
    assert evaluate(student, dtype="bfloat16", device="cpu", **QUICK).teacher.loss(128) != loss


def read(folders):
    from linearize.data import read_tokens

    return read_tokens(str(folders[2]), load(folders[1])[1])


def test_without_a_teacher_and_for_any_model(folders):
    source, student, text = folders
    alone = evaluate(student, teacher=False, lengths=[32], device="cpu", **QUICK)
    assert alone.teacher is None and "difference" not in alone.table()
    plain = evaluate(source, text=str(text), lengths=[32], device="cpu", **QUICK)
    assert plain.teacher is None and plain.student.branches == []


def test_a_report_names_the_text_that_the_recipe_leaves_to_its_data(folders):
    _, student, text = folders
    assert evaluate(student, teacher=False, lengths=[32], device="cpu", **QUICK).settings["text"] == str(text)
    (student / "recipe.yaml").write_text(f"data: {{source: {text}, seq_len: 64}}\n")
    report = evaluate(student, teacher=False, lengths=[32], split="train", device="cpu", **QUICK)
    assert report.settings["text"] == str(text) and report.settings["split"] == "train"


def test_local_questions_are_asked_of_both(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"query": f"{i} and", "choices": [str(i), "none at all", "x"], "gold": i % 3} for i in range(6)]
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"tasks_from": tmp_path / "questions", "limit": 5, "batch_size": "auto", **QUICK, "recall": False}
    report = evaluate(folders[1], output=tmp_path / "report.json", device="cpu", **options)
    assert report.settings["tasks"] == ["sums"] and report.settings["limit"] == 5
    for measured in (report.student, report.teacher):
        answers = measured.items["sums"]
        assert len(answers.right) == 5 and answers.right.count("1") / 5 == measured.tasks["sums"]["acc_norm"]
    (row,) = (line for line in report.table().splitlines() if line.startswith("| sums  "))
    assert row.split("|")[2].strip() == "5"
    assert report.student.asked == {"sums": Asked(5, 6, 0, own=True)}
    assert Report.from_json(tmp_path / "report.json") == report


def test_a_text_that_is_too_short_is_named_before_weights_are_loaded(folders, monkeypatch):
    source, student, text = folders
    monkeypatch.setattr("linearize.evals.evaluate.load", lambda *args, **options: pytest.fail("weights were loaded"))
    told = re.escape(f"lengths: the evaluation text {text} has 601 tokens, fewer than one window of ")
    with pytest.raises(UserError, match=f"{told}1,000; choose shorter lengths or a longer text"):
        evaluate(source, text=str(text), lengths=[64, 1000], device="cpu", **QUICK)
    text.write_text(json.dumps({"text": "a" * 100}) + "\n")
    with pytest.raises(UserError, match="has 101 tokens, fewer than one window of 128;"):
        evaluate(student, device="cpu", **QUICK)
    with pytest.raises(UserError, match="text demo, split dev, has .* tokens, fewer than one window of 9,999,999"):
        evaluate(source, text="demo", lengths=[9_999_999], device="cpu", **QUICK)


@pytest.mark.parametrize("probe", ["calibration", "gates", "kl_by_position", "transfer_error"])
def test_probes_of_longer_windows_than_the_text_are_refused_before_weights_are_loaded(folders, monkeypatch, probe):
    _, student, text = folders
    monkeypatch.setattr("linearize.evals.evaluate.load", lambda *args, **options: pytest.fail("weights were loaded"))
    told = re.escape(f"probe {probe}: the evaluation text {text} has 601 tokens, fewer than one window of length=602;")
    with pytest.raises(UserError, match=told):
        evaluate(student, probes=[{"type": probe, "length": 602}], device="cpu", **QUICK)
    monkeypatch.setattr("linearize.evals.evaluate.load", lambda *args, **options: (_ for _ in ()).throw(OverflowError))
    with pytest.raises(OverflowError):  # goes on to the weights
        evaluate(student, probes=[{"type": probe, "length": 601}, "length_extrapolation"], device="cpu", **QUICK)


def test_a_damaged_recipe_is_named(folders):
    for content, told in (("", "is empty"), ("a: [", "is not valid YAML"), ("text", "holds no recipe but a str")):
        (folders[1] / "recipe.yaml").write_text(content)
        with pytest.raises(UserError, match=rf"recipe\.yaml {told}"):
            evaluate(folders[1], device="cpu")


def test_a_teacher_that_nobody_names_is_an_error(folders):
    source, _, text = folders
    with pytest.raises(UserError, match=r"no recipe\.yaml that names its source model"):
        evaluate(source, teacher=True, text=str(text), device="cpu")


def test_settings_that_do_not_fit_name_the_key(folders):
    with pytest.raises(UserError, match="windows"):
        evaluate(folders[1], teacher=False, windows=0, device="cpu")


def test_the_teacher_is_the_revision_that_was_converted(folders, monkeypatch):
    source, student, _ = folders
    recipe = student / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(f"name: {source}", f"name: {source}, revision: v1"))
    asked = []

    def noted(path, **options):
        asked.append((path, options.get("revision"), options["trust_remote_code"]))
        return load(path, **{k: v for k, v in options.items() if k != "revision"})

    monkeypatch.setattr("linearize.evals.evaluate.load", noted)
    quick = {**QUICK, "recall": False, "branches": False, "divergence": False, "device": "cpu"}
    evaluate(student, trust_remote_code=True, **quick)
    evaluate(student, teacher=student, **quick)
    assert asked[:2] == [(str(student), None, True), (str(source), "v1", True)]
    assert asked[3] == (str(student), None, False), "the revision is the source model's"


def test_a_device_that_is_none_is_named(folders):
    with pytest.raises(UserError, match="unknown device 'tpu'; known: auto, cpu, cuda"):
        evaluate(folders[1], device="tpu", **QUICK)
