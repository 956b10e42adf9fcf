"""The lm-evaluation-harness on a live model, with a task file written here."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from linearize.errors import UserError
from linearize.evals import evaluate as evaluating
from linearize.evals.lm_harness import fetch_tasks, lm_eval_tasks

ROWS = [
    {"query": "one two", "choices": [" three", " zebra crossing"], "gold": 0},
    {"query": "red green", "choices": [" 9", " blue"], "gold": 1},
    {"query": "up", "choices": [" down", " up up"], "gold": 0},
    {"query": "A B C", "choices": [" x", " D"], "gold": 1},
]
TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    return tmp_path


def choice_by_likelihood(model, tokenizer, row):
    def score(choice):
        prompt, whole = (tokenizer(text)["input_ids"] for text in (row["query"], row["query"] + choice))
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(logp[t - 1, whole[t]]) for t in range(len(prompt), len(whole)))

    return max(range(len(row["choices"])), key=lambda i: score(row["choices"][i]))


def test_accuracy_is_that_of_the_likelier_choice(converted, pico_tokenizer, task_folder):
    model = converted("lolcats")
    results = lm_eval_tasks(model, pico_tokenizer, ["tiny_choice"], include_path=task_folder, batch_size=3)
    right = [choice_by_likelihood(model, pico_tokenizer, row) == row["gold"] for row in ROWS]
    assert results.scores["tiny_choice"]["acc"] == pytest.approx(sum(right) / len(ROWS))
    assert {"acc", "acc_norm", "acc_stderr"} <= set(results.scores["tiny_choice"])


def test_an_answer_longer_than_the_model_reads_is_named(converted, pico_tokenizer, task_folder):
    row = {"query": "A", "choices": ["b " * 600, "c"], "gold": 1}
    (task_folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="an answer of a task, 'b b .* has 1,200 tokens, and 1 to 512 fit this model"):
        lm_eval_tasks(converted("lolcats"), pico_tokenizer, ["tiny_choice"], include_path=task_folder)


def test_more_examples_than_questions(converted, pico_tokenizer, task_folder):
    with pytest.raises(UserError, match="tiny_choice has fewer questions than .* give a smaller num_fewshot"):
        lm_eval_tasks(converted("lolcats"), pico_tokenizer, ["tiny_choice"], include_path=task_folder, num_fewshot=50)


def refused_before_loading(monkeypatch, **options):
    """What `evaluate` says of the demo model without loading it."""
    monkeypatch.setattr(evaluating, "load", lambda *args, **options: pytest.fail("weights were loaded"))
    with pytest.raises(UserError) as error:
        evaluating.evaluate("demo", device="cpu", **options)
    return str(error.value)


@pytest.mark.parametrize("sampler", ["default", "first_n"])
def test_more_examples_than_questions_are_known_before_weights_are_loaded(task_folder, monkeypatch, sampler):
    with (task_folder / "tiny_choice.yaml").open("a") as file:
        file.write(f"fewshot_config: {{sampler: {sampler}}}\n")
    options = {"tasks": ["tiny_choice"], "include_path": task_folder}
    assert fetch_tasks(["tiny_choice"], task_folder, num_fewshot=4) == {"tiny_choice": 4}
    message = refused_before_loading(monkeypatch, num_fewshot=5, **options)
    assert "task tiny_choice has fewer questions to take examples from than the 5" in message


def test_examples_that_do_not_fit_are_known_before_weights_are_loaded(task_folder, monkeypatch):
    rows = [{"query": f"{i} word" * 900, "choices": [" a", " b"], "gold": 0} for i in range(4)]
    (task_folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = refused_before_loading(monkeypatch, num_fewshot=2, tasks=["tiny_choice"], include_path=task_folder)
    assert "with 2 examples the prompts of task tiny_choice have 5," in message
    assert "the model reads 2,048" in message and "give a smaller num_fewshot" in message


def test_random_numbers_go_on_as_if_no_task_had_run(converted, pico_tokenizer, task_folder):
    def draws():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed():
        random.seed(7), np.random.seed(7), torch.manual_seed(7)

    model = converted("lolcats")
    seed()
    expected = draws()
    seed()
    lm_eval_tasks(model, pico_tokenizer, ["tiny_choice"], include_path=task_folder)
    assert draws() == expected


def test_missing_folder_is_named(converted, pico_tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        lm_eval_tasks(converted("lolcats"), pico_tokenizer, ["x"], include_path=tmp_path / "nowhere")


def test_questions_are_counted_before_they_are_asked(task_folder):
    assert fetch_tasks([]) == {}
    assert fetch_tasks(["tiny_choice"], task_folder) == {"tiny_choice": 4}
    assert fetch_tasks(["tiny_choice"], task_folder, limit=3) == {"tiny_choice": 3}


def test_questions_that_cannot_be_had_are_named_before_weights_are_loaded(task_folder, monkeypatch):
    """The second of two tasks lies on the hub, and there is no network in tests."""
    absent = TASK.format(data="x").replace("tiny_choice", "absent").replace("path: json", "path: lab/absent")
    (task_folder / "absent.yaml").write_text(absent.replace("dataset_kwargs: {data_files: {test: x}}\n", ""))
    monkeypatch.setattr(evaluating, "load", lambda *args, **options: pytest.fail("weights were loaded"))
    said = []
    with pytest.raises(UserError, match=r"task absent: its questions cannot be read .*lab/absent") as error:
        tasks = {"tasks": ["tiny_choice", "absent"], "include_path": task_folder}
        evaluating.evaluate("demo", **tasks, device="cpu", say=said.append)
    assert all(remedy in str(error.value) for remedy in ("network", "HF_DATASETS_OFFLINE", "--tasks-from"))
    assert said == ["reading the questions of tiny_choice, absent"], "nothing was measured"


def test_no_bar_is_drawn_where_nobody_sees_it(converted, pico_tokenizer, task_folder, capsys, monkeypatch):
    ask = {"tasks": ["tiny_choice"], "include_path": task_folder}
    lm_eval_tasks(converted("lolcats"), pico_tokenizer, **ask)
    assert "%|" not in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    lm_eval_tasks(converted("lolcats"), pico_tokenizer, **ask)
    drawn = capsys.readouterr().err
    assert "prompts:" in drawn and "Running loglikelihood requests" in drawn
