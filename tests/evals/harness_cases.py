"""A folder of questions of every kind, and a task that writes text, for the tests of the harness."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

OPTIONS = [
    {"query": "one two", "choices": ["three", "zebra crossing", "x"], "gold": 0},
    {"query": "red green", "choices": ["9", "blue"], "gold": 1},
    {"query": "up", "choices": ["down", "up up"], "gold": 0},
    {"query": "A B C" * 9, "choices": ["x", "D"], "gold": 1},
    {"query": "a long question, of many more characters than others", "choices": ["so", "no", "go", "ho"], "gold": 3},
]
BEGINNINGS = [
    {"context_options": ["the cat because the cat", "the cat because the dog"], "continuation": "ran off.", "gold": 1},
    {"context_options": ["so A", "so long B"], "continuation": "won.", "gold": 0},
    {"context_options": ["the tree", "the fox and the fox"], "continuation": "grew.", "gold": 0},
]
PAIRS = {
    "island": [
        {"sentence_good": "who left?", "sentence_bad": "left who?"},
        {"sentence_good": "a", "sentence_bad": "b c"},
    ],
    "agreement": [{"sentence_good": "dogs bark.", "sentence_bad": "dogs barks."}] * 3,
}
WRITING = """\
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: query
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["\\n\\n", "zq"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
ALL = ["beginnings", "options", "story", "text", "pairs", "writing"]
"""Every kind of request: choices, log-likelihoods, whole texts, and text that is written."""


def letters(seed: int, length: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(string.ascii_lowercase + "  ") for _ in range(length)).strip()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_questions(folder: Path) -> Path:
    """Files of every kind below `folder`; texts are longer than the 64 positions that the tests' models have."""
    write_rows(folder / "options.jsonl", OPTIONS)
    write_rows(folder / "beginnings.jsonl", BEGINNINGS)
    story = [{"context": letters(i, 5 + 13 * i), "continuation": letters(50 + i, 3)} for i in range(5)]
    write_rows(folder / "story.jsonl", story)
    write_rows(folder / "text.jsonl", [{"text": letters(i, length)} for i, length in enumerate((7, 64, 65, 200))])
    for name, rows in PAIRS.items():
        write_rows(folder / "pairs" / f"{name}.jsonl", rows)
    return folder
