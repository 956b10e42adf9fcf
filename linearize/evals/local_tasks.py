"""Tasks of the lm-evaluation-harness from questions in local files, without the hub: `evaluate DIR --tasks-from DIR`.

Every `NAME.jsonl` in the folder is the task NAME, every sub-folder of such files a group; the fields of the rows say
what kind of task it is (`KINDS`). `python -m linearize.evals.local_tasks FOLDER OUT` writes the task files for good,
for `lm_eval --include_path OUT` or `linearize evaluate --include-path OUT`.
"""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from linearize.errors import UserError, did_you_mean

Row = dict[str, Any]


def _metric(name: str, aggregation: str = "mean", better: bool = True) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": better}


@dataclass(frozen=True)
class Kind:
    """A kind of task, known by the fields of its rows."""

    fields: tuple[str, ...]
    settings: dict[str, Any]
    """Keys of the harness's task file."""
    wrong: Callable[[Row], str | None] = lambda row: None
    """What is wrong with a row's values, None if nothing is."""


def _wrong_gold(options: str) -> Callable[[Row], str | None]:
    def wrong(row: Row) -> str | None:
        choices, gold = row[options], row["gold"]
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            return f"{options} must be two texts or more, got {choices!r}"
        if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
            return f"gold must be the number of an option, 0 to {len(choices) - 1}, got {gold!r}"
        return None

    return wrong


KINDS: dict[str, Kind] = {
    "options": Kind(
        ("query", "choices", "gold"),
        {
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [_metric("acc"), _metric("acc_norm")],
        },
        _wrong_gold("choices"),
    ),
    "beginnings": Kind(
        ("context_options", "continuation", "gold"),
        {
            "output_type": "multiple_choice",
            "doc_to_text": "gold",
            "doc_to_choice": "context_options",
            "doc_to_target": "continuation",
            "metric_list": [_metric("acc")],
        },
        _wrong_gold("context_options"),
    ),
    "continuation": Kind(
        ("context", "continuation"),
        {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": "{{' ' + continuation}}",
            "metric_list": [_metric("acc"), _metric("perplexity", "perplexity", better=False)],
        },
    ),
    "pair": Kind(
        ("sentence_good", "sentence_bad"),
        {
            "output_type": "multiple_choice",
            "doc_to_text": "",
            "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
            "doc_to_target": 0,
            "num_fewshot": 0,
            "metric_list": [_metric("acc")],
        },
    ),
    "text": Kind(
        ("text",),
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [
                _metric("word_perplexity", "weighted_perplexity", better=False),
                _metric("byte_perplexity", "weighted_perplexity", better=False),
                _metric("bits_per_byte", "bits_per_byte", better=False),
            ],
        },
    ),
}
"""Kinds by what is asked: which option ends the query (HellaSwag, PIQA, ARC, ...), which beginning fits the end
(WinoGrande, WSC), how a text goes on (LAMBADA), which sentence is right (BLiMP), and how likely a text is."""


NO_TEXTS, MAY_BE_EMPTY = {"choices", "context_options", "gold"}, {"query", "context"}
"""Fields of rows that hold something else than a text, and texts that may be empty."""


def write_tasks(folder: str | Path, out: str | Path) -> list[str]:
    """Write a task file for every file of questions, and a group for every sub-folder.

    A query and its options are joined by a space, unless all queries end, or all options begin, with one. `NAME.yaml`
    beside `NAME.jsonl` overrides keys of the task file, such as `doc_to_text: "{{query}}\\nAnswer:"`.

    Args:
        folder: holds the questions; stays as it is, and the task files point to it.
        out: where the task files go; created.

    Returns:
        The tasks and groups at the top of the folder, in order.

    Raises:
        UserError: for a folder without questions, rows of no known kind, values that do not fit, a name given twice.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r} with questions; `tasks_from` must name a folder of .jsonl files")
    tasks = {path: _task(path) for path in sorted(folder.glob("*.jsonl"))}
    groups = {sub: sorted(sub.glob("*.jsonl")) for sub in sorted(folder.iterdir()) if sub.is_dir()}
    groups = {sub: paths for sub, paths in groups.items() if paths}
    if not tasks and not groups:
        raise UserError(f"{folder} holds no .jsonl file of questions, nor a folder of them")
    top = [path.stem for path in tasks] + [sub.name for sub in groups]
    for paths in groups.values():
        tasks |= {path: _task(path) for path in paths}
    names = [path.stem for path in tasks] + [sub.name for sub in groups]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two tasks or groups of {folder} are called {twice[0]!r}; rename one")
    files = {path.stem: task for path, task in tasks.items()}
    for sub, paths in groups.items():
        members = [path.stem for path in paths]
        shared = [m["metric"] for m in files[members[0]]["metric_list"] if m["aggregation"] == "mean"]
        shared = [name for name in shared if all(name in _metrics_of(files[member]) for member in members)]
        means = [{"metric": name, "aggregation": "mean", "weight_by_size": False} for name in shared]
        files[sub.name] = {"group": sub.name, "task": members} | ({"aggregate_metric_list": means} if means else {})
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (out / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return top


def _metrics_of(task: dict[str, Any]) -> list[str]:
    return [metric["metric"] for metric in task["metric_list"]]


def _task(path: Path) -> dict[str, Any]:
    """The harness's task file for one file of questions."""
    rows = read_rows(path)
    kind = next((kind for kind in KINDS.values() if set(kind.fields) <= rows[0].keys()), None)
    if kind is None:
        known = "; ".join(", ".join(kind.fields) for kind in KINDS.values())
        raise UserError(f"{path} has rows with {', '.join(rows[0])}, which is no kind of task; known fields: {known}")
    for number, row in enumerate(rows, 1):
        missing = [name for name in kind.fields if row.get(name) is None]
        wrong = f"it lacks {missing[0]}" if missing else _wrong_text(kind, row) or kind.wrong(row)
        if wrong:
            raise UserError(f"{path}, line {number}: {wrong}")
    task = {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": glob.escape(str(path.resolve()))}},  # datasets reads a pattern
        "test_split": "test",
        **kind.settings,
    }
    if kind is KINDS["options"]:
        task["target_delimiter"] = _delimiter(path, rows)
    return task | _overrides(path.with_suffix(".yaml"), task)


def _wrong_text(kind: Kind, row: Row) -> str | None:
    for name in kind.fields:
        if name in NO_TEXTS:
            continue
        if not isinstance(row[name], str):
            return f"{name} must be a text, got {row[name]!r}"
        if not row[name] and name not in MAY_BE_EMPTY:
            return f"{name} is empty"
    return None


def read_rows(path: Path) -> list[Row]:
    """The questions of a JSONL file, an object a line.

    Raises:
        UserError: for a line that is none, and an empty file.
    """
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}; save it as UTF-8") from None
    if not text.strip():
        raise UserError(f"{path} is empty; delete it or fill it with questions, one JSON object a line")
    for number, line in enumerate(text.rstrip().split("\n"), 1):  # a line of JSON may hold other line separators
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} must be an object with fields, got {row!r}")
        rows.append(row)
    return rows


def _delimiter(path: Path, rows: Sequence[Row]) -> str:
    spaced = [row["query"][-1:].isspace() or all(choice[:1].isspace() for choice in row["choices"]) for row in rows]
    if any(spaced) and not all(spaced):
        one = spaced.index(not spaced[0]) + 1
        raise UserError(
            f"{path}: some queries end with a space (or their options begin with one) and others do not, such as lines "
            f"1 and {one}; write all in one way"
        )
    return "" if all(spaced) else " "


def _overrides(path: Path, task: dict[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    known = {
        *task,
        "target_delimiter",
        "description",
        "fewshot_delimiter",
        "num_fewshot",
        "metadata",
        "generation_kwargs",
    }
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys of a task file, such as doc_to_text, got {values!r}")
    for key in values:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{did_you_mean(key, sorted(known))}")
    return values


@contextmanager
def local_tasks(folder: str | Path | None) -> Iterator[tuple[list[str], list[str]]]:
    """Task files that are there for a while: `with local_tasks(folder) as (include_paths, names)`; none for None."""
    if folder is None:
        yield [], []
        return
    with TemporaryDirectory(prefix="linearize-tasks-") as out:
        names = write_tasks(folder, out)
        yield [out], names


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description="Write lm-evaluation-harness task files for a folder of questions.")
    parser.add_argument("folder", help="holds the questions, one .jsonl a task")
    parser.add_argument("out", help="where the task files go")
    told = parser.parse_args(arguments)
    print(*write_tasks(told.folder, told.out), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
