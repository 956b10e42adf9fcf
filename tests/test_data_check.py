"""What is known of data files before anything is prepared: it agrees with what `prepare` finds out, and is cheap."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trainable import make_recipe, recipe_dict

from linearize.cli.main import main
from linearize.data import DataConfig, check, check_source, prepare
from linearize.errors import UserError
from linearize.preflight import check_sources
from linearize.recipe import Recipe

TEXT = "One fish, two fish, and a longer tail of words."
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, what can I do for you?"}]
PAIR = {"prompt": "Name a fish.", "chosen": " Carp", "rejected": " Cow"}


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def zipped(content: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.jsonl", content)
    return stream.getvalue()


NO_TEXTS = pa.array([], pa.string())
GOOD: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "text": ("a.jsonl", lines({"text": TEXT}), {}),
    "blank lines and a byte order mark": ("a.jsonl", "\ufeff\n" + lines({"text": TEXT}), {}),
    "a column that comes later": ("a.jsonl", lines({"n": 1}, {"n": 2, "text": TEXT}), {}),
    "a value that is null at first": ("a.jsonl", lines({"messages": None}, {"messages": CHAT}), {}),
    "a column of another name": ("a.jsonl", lines({"body": TEXT}), {"text_column": "body"}),
    "chat": ("a.jsonl", lines({"messages": CHAT}), {"completion_only": True}),
    "instruction": ("a.jsonl", lines({"instruction": TEXT, "output": TEXT}), {}),
    "pairs": ("a.jsonl", lines(PAIR), {"format": "preference"}),
    "list of objects": ("a.json", json.dumps([{"text": TEXT}, {"text": TEXT}], indent=1), {}),
    "list of texts": ("a.json", json.dumps([TEXT, TEXT]), {}),
    "one object": ("a.json", json.dumps({"text": TEXT}, indent=1), {}),
    "document": ("a.txt", TEXT, {}),
    "gzip": ("a.jsonl", gzip.compress(lines({"text": TEXT}).encode()), {}),
    "bz2": ("a.json", bz2.compress(json.dumps([{"text": TEXT}]).encode()), {}),
    "xz": ("a.txt", lzma.compress(TEXT.encode()), {}),
    "zip": ("a.jsonl", zipped(lines({"text": TEXT})), {}),
    "objects of several lines": ("a.jsonl", lines({"text": TEXT}) + json.dumps({"text": TEXT}, indent=1), {}),
    "parquet": ("a.parquet", {"text": [TEXT, TEXT]}, {}),
    "parquet chat": ("a.parquet", {"messages": [CHAT]}, {}),
}
BAD: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "no column": ("a.jsonl", lines({"body": TEXT}, {"n": 1}), {}, "no column that fits .* its columns are body, n"),
    "misspelt column": ("a.jsonl", lines({"body": TEXT}), {"text_column": "boby"}, "did you mean 'body'"),
    "numbers": ("a.jsonl", lines({"text": 3}), {}, "no column that fits"),
    "no pairs": ("a.jsonl", lines({"text": TEXT}), {"format": "preference"}, "has no pairs"),
    "no replies": ("a.txt", TEXT, {"completion_only": True}, "needs chat or instruction data"),
    "object of columns": ("a.json", json.dumps({"text": [TEXT]}, indent=1), {}, "its columns are text"),
    "parquet column": ("a.parquet", {"body": [TEXT]}, {}, "its columns are body"),
    "parquet chat": ("a.parquet", {"text": [TEXT]}, {"format": "chat"}, "no column that fits data.format=chat"),
    "broken JSON": ("a.jsonl", "{broken\n", {}, "cannot read data.source=.*; check that the files are"),
    "broken later": ("a.jsonl", lines(*[{"text": TEXT}] * 3) + "{broken\n" + lines({"text": TEXT}), {}, "line 4: Exp"),
    "cut off": ("a.jsonl", lines({"text": TEXT}) + '{"text": "One', {}, "line 2: Unterminated string"),
    "a text of several lines": ("a.json", '{"text": "One\nfish", "n": }\n', {}, "cannot read data.source=.*a.json"),
    "gzip cut off": (
        "a.jsonl",
        gzip.compress(lines({"text": TEXT}).encode())[:-9],
        {},
        "a.jsonl: .* end",
    ),
    "no rows": ("a.parquet", {"text": NO_TEXTS}, {}, "a.parquet has no rows; remove it, or choose other data"),
    "empty list": ("a.json", "[ ]", {}, "a.json has no rows; remove it"),
    "blank lines": ("a.jsonl", "\n\n", {}, "a.jsonl has no rows; remove it"),
    "broken list": ("a.json", "[{broken", {}, "cannot read data.source=.*a.json"),
    "no parquet": ("a.parquet", TEXT, {}, "cannot read data.source=.*a.parquet.*; check that the files are"),
    "no UTF-8": ("a.txt", b"\xff\xfe\x00\x01", {}, "cannot read data.source=.*a.txt.*utf-8"),
    "empty": ("a.jsonl", "", {}, "is empty; choose other data"),
    "another kind": ("a.csv", "text\nfish", {}, "must name files of one kind; found .csv, known: .parquet.*from_csv"),
    "packed by name": ("a.jsonl.gz", gzip.compress(b"{}"), {}, "found .gz, known: .parquet.*; unpack them"),
}


def written(folder: Path, name: str, content: Any, **settings: Any) -> DataConfig:
    path = folder / name
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return DataConfig(source=str(path), seq_len=32, packing=False, **settings)


@pytest.mark.parametrize("case", GOOD)
def test_what_can_be_prepared_passes(case: str, tmp_path: Path, pico_tokenizer: Any) -> None:
    name, content, settings = GOOD[case]
    config = written(tmp_path, name, content, **settings)
    check_source(config)
    assert len(prepare(config, pico_tokenizer, cache_dir=tmp_path / "cache")) > 0


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_is_refused_before(case: str, tmp_path: Path, pico_tokenizer: Any) -> None:
    name, content, settings, message = BAD[case]
    config = written(tmp_path, name, content, **settings)
    with pytest.raises(UserError, match=message):
        check_source(config)
    with pytest.raises(UserError):
        prepare(config, pico_tokenizer, cache_dir=tmp_path / "cache")


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "texts" / "notes.txt").mkdir(parents=True)
    for source in (str(tmp_path / "texts"), str(tmp_path / "*.txt")):
        with pytest.raises(UserError, match="must name files of one kind; found none"):
            check_source(DataConfig(source=source))
    for source in ("texts/", "none.csv", "texts/none.CSV", "none.jsonl.gz"):
        with pytest.raises(UserError, match=f"'{source}' does not exist"):
            check_source(DataConfig(source=source))
    written(tmp_path, "texts/a.jsonl", lines({"text": TEXT}))
    config = DataConfig(source=str(tmp_path / "texts"))
    check_source(config)
    written(tmp_path, "texts/empty.jsonl", "\n")  # `datasets` passes over it
    check_source(config)
    written(tmp_path, "texts/b.jsonl", "{broken")
    with pytest.raises(UserError, match="cannot read data.source=.*texts': b.jsonl: "):
        check_source(config)
    check_source(DataConfig(source="someone/fish"))  # of the hub nothing is asked


def test_tables_are_converted_as_the_error_says(tmp_path: Path, pico_tokenizer: Any) -> None:
    written(tmp_path, "NAME.csv", f'text\n"{TEXT}"\n')
    with pytest.raises(UserError) as caught:
        check_source(DataConfig(source=str(tmp_path)))
    code = re.search(r'python -c "(.*)"', str(caught.value))
    assert code
    subprocess.run([sys.executable, "-c", code[1]], cwd=tmp_path, check=True, capture_output=True)
    config = DataConfig(source=str(tmp_path / "NAME.parquet"), seq_len=32, packing=False)
    check_source(config)
    assert len(prepare(config, pico_tokenizer, cache_dir=tmp_path / "cache")) == 1


def test_no_more_is_read_than_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "LOOKED_AT", 200)
    monkeypatch.setattr(check, "ROWS", 2)
    check_source(written(tmp_path, "a.jsonl", lines(*[{"text": TEXT}] * 3) + "{broken"))
    check_source(written(tmp_path, "cut.jsonl", lines({"text": TEXT}) + json.dumps({"text": ["x" * 400]}, indent=1)))
    check_source(written(tmp_path, "a.json", json.dumps([{"text": TEXT}] * 9)[:-3]))
    check_source(written(tmp_path, "long.jsonl", lines({"n": "x" * 400}, {"text": TEXT})))  # cannot be told
    check_source(written(tmp_path, "long.json", json.dumps({"body": ["x" * 400]}, indent=1)))
    with pytest.raises(UserError, match="its columns are n"):
        check_source(written(tmp_path, "b.jsonl", lines(*[{"n": 1}] * 99, {"text": TEXT})))


SECTIONS: list[tuple[dict[str, Any], str]] = [
    ({"data": {"source": "missing.jsonl"}}, "'missing.jsonl' does not exist"),
    ({"data": {"source": "body.jsonl"}}, "no column that fits"),
    ({"stages": [{"type": "finetune", "tokens": 1, "lora": {}, "data": {"text_column": "x"}}]}, "'x' is not a column"),
    ({"stages": [], "init": {"type": "calibrated"}, "data": {"source": "body.jsonl"}}, "no column that fits"),
    ({"evaluation": {"text": "body.jsonl"}}, "evaluation.text: .*no column that fits"),
    ({"evaluation": {"text": "empty"}}, "evaluation.text: .*found none"),
]


@pytest.mark.parametrize(("sections", "message"), SECTIONS)
@pytest.mark.parametrize("command", ["plan", "dry run"])
def test_plan_and_dry_run_look_at_data_files(
    source: Path,
    sections: dict[str, Any],
    message: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import yaml

    monkeypatch.chdir(source)
    (source / "empty").mkdir()
    written(source, "body.jsonl", lines({"body": TEXT}))
    (source / "mine.yaml").write_text(yaml.safe_dump(recipe_dict(source, **sections)))
    arguments = ["plan"] if command == "plan" else ["convert", "--dry-run"]
    assert main([*arguments, "--recipe", "mine.yaml"]) == 2
    told = capsys.readouterr()
    assert "source  " not in told.out
    with pytest.raises(UserError, match=message) as caught:
        check_sources(Recipe.load("mine.yaml"))
    assert " ".join(str(caught.value).split()) in " ".join(told.err.split())


def test_a_plan_of_good_data_is_printed(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "mine.yaml").write_text(make_recipe(source).to_yaml())
    assert main(["plan", "--recipe", str(source / "mine.yaml")]) == 0
    assert "train.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ('{"text": "One\nfish', False),
        ('{"text": "One\nfish\\', False),
        ('{"text": [1,\n 2', False),
        ('{"text": "One" "fish",\n "n', True),
        ('{"text": One\nfish', True),
    ],
)
def test_what_is_cut_off_is_not_broken(text: str, broken: bool) -> None:
    assert check._is_broken(text) == broken
    assert check._is_broken(text, whole=True)
