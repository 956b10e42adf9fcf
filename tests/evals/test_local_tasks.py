"""Folders of questions as tasks: what each kind is scored by, groups, overrides, and what is wrong with a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from evals.harness_cases import BEGINNINGS, OPTIONS, PAIRS, write_questions, write_rows

from linearize.errors import UserError
from linearize.evals.items import Asked
from linearize.evals.lm_harness import TaskResults, lm_eval_tasks
from linearize.evals.local_tasks import local_tasks, write_tasks


@pytest.fixture
def student(converted: Any) -> Any:
    return converted("lolcats", max_position_embeddings=64)


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip for all packages: seconds
    return write_questions(tmp_path / "questions")


def run(model: Any, tokenizer: Any, folder: Path, **options: Any) -> TaskResults:
    with local_tasks(folder) as (paths, names):
        return lm_eval_tasks(model, tokenizer, names, include_path=paths, **options)


@pytest.mark.parametrize("name", ["g[1]", "a*b", "what?", "{x}"])
def test_a_folder_may_be_called_like_a_pattern(
    name: str, student: Any, pico_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    write_rows(tmp_path / name / "sums.jsonl", OPTIONS)
    write_rows(tmp_path / "g1" / "sums.jsonl", OPTIONS[:1])
    found = run(student, pico_tokenizer, tmp_path / name)
    assert len(found.items["sums"].right) == len(OPTIONS)


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Of the continuation, token by token, after the context or the beginning-of-text token."""
    import torch

    before = tokenizer(context)["input_ids"] or [0]
    after = tokenizer(continuation)["input_ids"]
    ids = [*before, *after]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)[-len(after) :]
    return float(sum(row[token] for row, token in zip(logits, after, strict=True))), logits.argmax(-1).tolist() == after


def test_scores_are_those_of_the_definitions(student: Any, pico_tokenizer: Any, questions: Path) -> None:
    found = run(student, pico_tokenizer, questions)

    def score(context: str, continuation: str) -> float:
        return log_likelihood(student, pico_tokenizer, context, continuation)[0]

    def best(scores: list[float]) -> int:
        return scores.index(max(scores))

    plain, normed = [], []
    for row in OPTIONS:
        scores = [score(row["query"], f" {choice}") for choice in row["choices"]]
        plain.append(best(scores))
        normed.append(best([s / len(choice) for s, choice in zip(scores, row["choices"], strict=True)]))
    golds = [row["gold"] for row in OPTIONS]
    assert found.scores["options"]["acc"] == pytest.approx(sum(map(int.__eq__, plain, golds)) / 5)
    assert found.scores["options"]["acc_norm"] == pytest.approx(sum(map(int.__eq__, normed, golds)) / 5)
    answers = found.items["options"]
    assert answers.metric == "acc_norm" and answers.chosen == " ".join(map(str, normed))
    assert answers.flags() == [a == b for a, b in zip(normed, golds, strict=True)]
    assert plain != normed  # so that the metrics can be told apart

    chosen = [best([score(c, f" {row['continuation']}") for c in row["context_options"]]) for row in BEGINNINGS]
    right = [c == row["gold"] for c, row in zip(chosen, BEGINNINGS, strict=True)]
    assert found.scores["beginnings"]["acc"] == pytest.approx(sum(right) / 3)
    assert found.items["beginnings"].chosen == " ".join(map(str, chosen))

    for name, rows in PAIRS.items():
        right = [score("", f" {row['sentence_good']}") > score("", f" {row['sentence_bad']}") for row in rows]
        assert found.scores[name]["acc"] == pytest.approx(sum(right) / len(rows))
        assert found.items[name].flags() == right


def test_lambada_and_texts_are_scored_as_defined(student: Any, pico_tokenizer: Any, questions: Path) -> None:
    import json
    import math

    found = run(student, pico_tokenizer, questions)
    rows = [json.loads(line) for line in (questions / "story.jsonl").read_text().splitlines()]
    known = [log_likelihood(student, pico_tokenizer, r["context"], f" {r['continuation']}") for r in rows]
    assert found.scores["story"]["acc"] == pytest.approx(sum(greedy for _, greedy in known) / 5)
    assert found.scores["story"]["perplexity"] == pytest.approx(math.exp(-sum(ll for ll, _ in known) / 5), rel=1e-4)
    assert found.items["story"].chosen == ""

    texts = [json.loads(line)["text"] for line in (questions / "text.jsonl").read_text().splitlines()]
    total = 0.0
    for text in texts:  # windows of 64 tokens, each after the token before it, the last one reaching back
        for start in range(0, len(text), 64):
            end = min(start + 64, len(text))
            context = text[max(0, end - 65) : start]
            total += log_likelihood(student, pico_tokenizer, context, text[start:end])[0]
    words, size = sum(len(text.split()) for text in texts), sum(map(len, texts))
    assert found.scores["text"]["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert found.scores["text"]["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert "text" not in found.items


def test_a_folder_in_the_folder_is_a_group_with_the_mean_of_its_tasks(
    student: Any, pico_tokenizer: Any, questions: Path
) -> None:
    found = run(student, pico_tokenizer, questions)
    assert found.groups == {"pairs": ["agreement", "island"]}
    mean = (found.scores["agreement"]["acc"] + found.scores["island"]["acc"]) / 2
    assert found.scores["pairs"]["acc"] == pytest.approx(mean)  # not by size: 3 and 2 sentences


def test_limit_and_fewshot_reach_the_tasks(student: Any, pico_tokenizer: Any, questions: Path) -> None:
    none = run(student, pico_tokenizer, questions, limit=2)
    assert none.asked["options"] == Asked(2, len(OPTIONS), 0, own=True)
    assert none.asked["pairs"] == Asked(4, 5, 0, own=True)  # of its tasks together
    assert {len(answers.right) for answers in none.items.values()} == {2}
    some = run(student, pico_tokenizer, questions, limit=2, num_fewshot=1)
    assert some.items["options"].documents != none.items["options"].documents  # another prompt
    assert some.asked["options"].shots == 1 and some.asked["island"].shots == 0
    assert some.items["island"] == none.items["island"]  # the task says 0


def test_settings_beside_the_questions(tmp_path: Path) -> None:
    write_rows(tmp_path / "q" / "quiz.jsonl", OPTIONS)
    (tmp_path / "q" / "quiz.yaml").write_text('doc_to_text: "Q: {{query}}\\nA:"\n')
    assert write_tasks(tmp_path / "q", tmp_path / "out") == ["quiz"]
    task = yaml.safe_load((tmp_path / "out" / "quiz.yaml").read_text())
    assert task["doc_to_text"] == "Q: {{query}}\nA:" and task["target_delimiter"] == " "
    (tmp_path / "q" / "quiz.yaml").write_text("doc_to_txt: x\n")
    with pytest.raises(UserError, match=r"quiz\.yaml: unknown key 'doc_to_txt'; did you mean 'doc_to_text'"):
        write_tasks(tmp_path / "q", tmp_path / "out")


@pytest.mark.parametrize(("query", "choice", "delimiter"), [("Q", "a", " "), ("Q\n", "a", ""), ("Q", " a", "")])
def test_queries_and_options_are_joined_by_one_space_at_most(
    tmp_path: Path, query: str, choice: str, delimiter: str
) -> None:
    write_rows(tmp_path / "q" / "quiz.jsonl", [{"query": query, "choices": [choice, choice + "b"], "gold": 0}] * 2)
    write_tasks(tmp_path / "q", tmp_path / "out")
    assert yaml.safe_load((tmp_path / "out" / "quiz.yaml").read_text())["target_delimiter"] == delimiter


GOOD = {"query": "Q", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([{"question": "Q"}], "rows with question, which is no kind of task; known fields: query, choices, gold;"),
        ([GOOD, {**GOOD, "gold": 2}], r"line 2: gold must be the number of an option, 0 to 1, got 2"),
        ([GOOD, {**GOOD, "gold": "A"}], "line 2: gold must be"),
        ([{**GOOD, "choices": ["a"]}], r"line 1: choices must be two texts or more"),
        ([GOOD, {"query": "Q", "gold": 0}], "line 2: it lacks choices"),
        ([GOOD, {**GOOD, "query": "Q "}], "lines 1 and 2; write all in one way"),
        ([{**GOOD, "query": 3}], "line 1: query must be a text, got 3"),
        ([{"context": ["a"], "continuation": "b"}], r"line 1: context must be a text, got \['a'\]"),
        ([{"context": "a", "continuation": ""}], "line 1: continuation is empty"),
        ([{"text": "a"}, {"text": ""}], "line 2: text is empty"),
        ([{"sentence_good": 1, "sentence_bad": "a"}], "line 1: sentence_good must be a text"),
        ([GOOD, "text"], "line 2 must be an object with fields, got 'text'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, rows: list, message: str) -> None:
    write_rows(tmp_path / "q" / "quiz.jsonl", rows)
    with pytest.raises(UserError, match=message):
        write_tasks(tmp_path / "q", tmp_path / "out")


@pytest.mark.parametrize(("text", "message"), [("a: [\n", "is not valid YAML"), ("[1]", "must hold keys of a task")])
def test_settings_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    write_rows(tmp_path / "q" / "quiz.jsonl", [GOOD])
    (tmp_path / "q" / "quiz.yaml").write_text(text)
    with pytest.raises(UserError, match=f"quiz.yaml {message}"):
        write_tasks(tmp_path / "q", tmp_path / "out")


def test_a_byte_order_mark_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "quiz.jsonl").write_text("\ufeff" + json.dumps(GOOD), encoding="utf-8")
    assert write_tasks(tmp_path, tmp_path / "out") == ["quiz"]


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder .*nowhere"):
        write_tasks(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "q").mkdir()
    with pytest.raises(UserError, match="holds no .jsonl file"):
        write_tasks(tmp_path / "q", tmp_path / "out")
    for name in ("quiz.jsonl", "more/quiz.jsonl"):
        write_rows(tmp_path / "q" / name, [GOOD])
    with pytest.raises(UserError, match="are called 'quiz'; rename one"):
        write_tasks(tmp_path / "q", tmp_path / "out")


def test_the_module_writes_task_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "q" / "quiz.jsonl", [GOOD])
    command = [sys.executable, "-m", "linearize.evals.local_tasks", str(tmp_path / "q"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "quiz\n" and (tmp_path / "out" / "quiz.yaml").is_file()
    done = subprocess.run([*command[:-2], "nowhere", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: no folder 'nowhere'")
