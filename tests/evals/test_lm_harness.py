"""The lm-evaluation-harness on a live model, with a task file written here."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from linearize.errors import UserError
from linearize.evals.lm_harness import lm_eval_tasks

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
