"""What is damaged or foreign is left out of a report, with a line that names it, and spares everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from left import bench, evaluation, folder

from linearize.cli.main import main
from linearize.errors import UserError
from linearize.report.sources import read_sources

Harm = Callable[[Path], object]


def change(name: str, **values: object) -> Harm:
    """Sets keys of a JSON file."""

    def harm(at: Path) -> None:
        (at / name).write_text(json.dumps({**json.loads((at / name).read_text()), **values}))

    return harm


def write(name: str, text: str | bytes) -> Harm:
    def harm(at: Path) -> None:
        (at / name).parent.mkdir(exist_ok=True)
        (at / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return harm


def part(name: str, key: str, value: object) -> Harm:
    """Adds an evaluation whose student is not what it should be."""

    def harm(at: Path) -> None:
        values = json.loads(evaluation(at / name, "runs/harmed").read_text())
        values["student"][key] = value
        (at / name).write_text(json.dumps(values))

    return harm


ITEMS = {"metric": "acc", "documents": "same", "right": "10", "chosen": "0 1"}


def other_questions(at: Path) -> None:
    values = json.loads(evaluation(at / "e.json", "runs/harmed").read_text())
    values["student"]["items"] = {"piqa": ITEMS}
    values["teacher"]["items"] = {"piqa": {**ITEMS, "documents": "others"}}
    (at / "e.json").write_text(json.dumps(values))


def half_a_bench(at: Path) -> None:
    values = json.loads(bench(at / "b.json").read_text())
    (at / "b.json").write_text(json.dumps({**values, "speeds": values["speeds"][:1]}))


CASES: list[tuple[Harm, str, str]] = [
    (write("run/measurements.json", '[["teacher", {"losses": ['), "run/measurements.json", "is not JSON"),
    (write("run/measurements.json", "[]"), "run/measurements.json", "nothing was measured yet"),
    (write("run/measurements.json", '{"losses": []}'), "run/measurements.json", "should be a valid list"),
    (write("run/measurements.json", '[["a", {"losses": [{"length": 3}]}]]'), "run/measurements.json", "0.1.losses.0"),
    (lambda at: (at / "run" / "measurements.json").unlink(), "run/measurements.json", "is missing"),
    (write("run/old/metrics.jsonl", '{"a": 1}\n'), "run/old/metrics.jsonl", "is of no stage"),
    (write("run/1-finetune/metrics.jsonl", '{"a": 1}\n[1}\n'), "run/1-finetune/metrics.jsonl", "is no log of a stage"),
    (write("run/1-finetune/metrics.jsonl", '{"tokens": 1, "loss": 2}\n{]\n{}\n'), "run/1-finetune", "2 of its lines"),
    (write("run/1-finetune/metrics.jsonl", '{"tokens": 1, "loss": NaN}'), "run/1-finetune", "not finite"),
    (write("run/layers.json", '{"x": 1}'), "run/layers.json", "rounds"),
    (write("run/recipe.yaml", b"\xff\xfe"), "run/recipe.yaml", "is not text"),
    (write("run/recipe.yaml", "a: [1"), "run/recipe.yaml", "is not valid YAML"),
    (write("notes.json", "hello"), "notes.json", "is not JSON"),
    (part("e.json", "losses", [{"length": "long"}]), "e.json", "student.losses.0"),
    (part("e.json", "items", 3), "e.json", "student.items"),
    (other_questions, "e.json", "different questions of piqa"),
    (half_a_bench, "b.json", "teacher and student"),
    (lambda at: (at / "run" / "plan.json").unlink(), "harmed", "has no run/plan.json"),
    (lambda at: (at / "run" / "plan.json").write_text("[" * 20_000), "run/plan.json", "is not JSON"),
    (change("run/plan.json", state_bytes=[1]), "run/plan.json", "different numbers of layers"),
    (change("run/plan.json", layers=3), "run/plan.json", "layers"),
]


@pytest.mark.parametrize(("harm", "name", "why"), CASES, ids=[f"{name}: {why}" for _, name, why in CASES])
def test_damage_is_named_and_spares_the_rest(
    harm: Harm, name: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, harmed = folder(tmp_path / "whole"), folder(tmp_path / "harmed")
    harm(harmed)
    found = read_sources([whole, harmed])
    assert found.models[0].name == "whole" and found.models[0].stages
    (line,) = [line for line in found.left_out if why in line]
    assert str(harmed) in line and name in line
    assert main(["report", str(whole), str(harmed), "--html", "none"]) == 0
    printed = capsys.readouterr()
    assert f"left out: {line}" in printed.err and "| whole" in printed.out


def test_the_page_says_what_was_left_out(tmp_path: Path) -> None:
    whole, harmed = folder(tmp_path / "whole"), folder(tmp_path / "harmed")
    (harmed / "run" / "measurements.json").write_text("[]")
    (tmp_path / "notes.txt").write_text("hello")
    page = tmp_path / "page.html"
    assert main(["report", str(whole), str(harmed), str(tmp_path / "notes.txt"), "--html", str(page)]) == 0
    text = page.read_text()
    assert "measurements.json is empty" in text and "notes.txt is neither a folder nor JSON" in text
    assert "Stage 1, attention_transfer" in text and ">harmed</td>" in text


def test_an_old_result_of_a_probe_is_named_on_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, page = folder(tmp_path / "gdn"), tmp_path / "page.html"
    measured = made / "run" / "measurements.json"
    measured.write_text(measured.read_text().replace('"same": 0.25', '"alike": 0.25'))
    assert main(["report", str(made), "--html", str(page)]) == 0
    why = "the probe kl_by_position of gdn was measured, but cannot be shown: its result is damaged"
    assert f"left out: {why}" in capsys.readouterr().err and why in page.read_text()


def test_folders_that_look_like_files_are_no_matter(tmp_path: Path) -> None:
    made = folder(tmp_path / "x.json")
    (made / "y.json").mkdir()
    found = read_sources([made])
    assert [model.name for model in found.models] == ["x.json"] and found.left_out == []


def test_a_path_given_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = folder(tmp_path / "gdn")
    timed = bench(made / "timed.json")
    monkeypatch.chdir(tmp_path)
    found = read_sources(["gdn", "gdn/", str(made), "./gdn", timed, "gdn/../gdn/timed.json"])
    assert [model.name for model in found.models] == ["gdn"] and list(found.benches) == ["gdn"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"results": {}, "configs": {}}, r"as the lm-evaluation-harness writes; `linearize evaluate MODEL --tasks"),
        ({"a": 1}, r"it holds an object with 'a'; give one of these, or a folder"),
        ([], "it holds an empty list"),
        ("text", "it holds 'text'"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--trust-remote-code"]])
def test_a_foreign_json_is_told_what_it_is(
    values: object, message: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(values))
    assert main(["report", str(path), *more, "--html", "none"]) == 2
    assert message in capsys.readouterr().err


def test_a_part_of_a_conversion_leads_to_its_folder(tmp_path: Path) -> None:
    made = folder(tmp_path / "gdn")
    for name in ("config.json", "run/plan.json"):
        with pytest.raises(UserError, match=f"give its folder, {made}"):
            read_sources([made / name])


def test_nothing_to_show_names_everything(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path in paths:
        path.write_text("{}")
    with pytest.raises(UserError) as caught:
        read_sources(paths)
    assert all(str(path) in str(caught.value) for path in paths)


def test_evaluations_of_one_model_are_told_apart_by_their_files(tmp_path: Path) -> None:
    made = folder(tmp_path / "gdn")
    for name in ("before.json", "after.json"):
        evaluation(made / name, "runs/gdn")
    assert list(read_sources([made]).evaluations) == ["gdn (after)", "gdn (before)"]
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
    files = [evaluation(tmp_path / place / "e.json", "runs/kda") for place in ("x", "y")]
    assert list(read_sources([*files, evaluation(tmp_path / "z.json", "lolcats")]).evaluations) == [
        "kda (x/e)",
        "kda (y/e)",
        "lolcats",
    ]
    assert main(["report", str(made), "--html", "none", "--output", str(tmp_path / "all.json")]) == 0
    assert [m.name for m in read_sources([made, tmp_path / "all.json"]).models] == ["gdn", "gdn (all)"]


def test_pictures_do_not_go_among_other_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = folder(tmp_path / "runs" / "gdn")
    assert main(["report", str(made), "--html", str(tmp_path / "runs.html")]) == 2
    printed = capsys.readouterr()
    assert "which holds other things" in printed.err and printed.out == ""
