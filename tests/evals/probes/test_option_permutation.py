"""The probe option_permutation on stand-in models whose letters are known, and against scores written out."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from linearize.errors import UserError
from linearize.evals.probes import option_permutation
from linearize.evals.probes.base import Subject, probe_of

TEXT = torch.randint(3, 97, (500,), generator=torch.Generator().manual_seed(0))
QUESTIONS = [{"query": f"which {i}?", "choices": ["red", "green", "blue"], "gold": i % 3} for i in range(6)]


@pytest.fixture
def asked(tmp_path: Any, pico_model: Callable[..., Any], pico_tokenizer: Any) -> Callable[..., dict[str, Any]]:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))

    def ask(batch_size: int = 4, **settings: Any) -> dict[str, Any]:
        subject = Subject(pico_model().eval(), pico_tokenizer, TEXT, 32, batch_size)
        with torch.no_grad():
            return probe_of({"type": "option_permutation", "questions": str(file), **settings}).run(subject)

    return ask


def test_a_model_that_looks_at_letters_alone_is_found_out(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(option_permutation, "log_likelihoods", lambda model, batch: [[-3.0, -1.0, -2.0] for _ in batch])
    found = asked()
    assert found["chosen"] == [0, 1, 0] and found["right"] == [0, 1, 0]
    assert found["consistent"] == 0 and found["accuracy"] == pytest.approx(1 / 3)


def test_a_model_that_knows_is_right_in_every_order(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def knows(model: Any, batch: Any) -> list[list[float]]:
        gold = [(QUESTIONS[a.question]["gold"] - a.rotation) % 3 for a in batch]  # type: ignore[operator]
        return [[-float(k != letter) for k in range(3)] for letter in gold]

    monkeypatch.setattr(option_permutation, "log_likelihoods", knows)
    found = asked()
    assert found["accuracy"] == found["consistent"] == 1 and found["right"] == [1, 1, 1]
    assert found["chosen"] == pytest.approx([1 / 3] * 3)


def test_letters_are_scored_as_the_model_scores_them(asked: Any, pico_model: Any, pico_tokenizer: Any) -> None:
    model, letters, options = pico_model().eval(), [0, 0, 0], []
    for question in QUESTIONS:
        chosen = set()
        for rotation in range(3):
            order = [(k + rotation) % 3 for k in range(3)]
            lines = [f"{'ABC'[k]}. {question['choices'][option]}" for k, option in enumerate(order)]
            prompt = "\n".join([question["query"], *lines, "Answer:"])
            scores = []
            for letter in "ABC":
                alone = pico_tokenizer(prompt, add_special_tokens=False)["input_ids"]
                ids = torch.tensor([pico_tokenizer(f"{prompt} {letter}", add_special_tokens=False)["input_ids"]])
                with torch.no_grad():
                    log_p = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
                of = range(len(alone), ids.shape[1])
                scores.append(sum(float(log_p[t - 1, ids[0, t]]) for t in of))
            best = max(range(3), key=lambda k: scores[k])
            letters[best] += 1
            chosen.add(order[best])
        options.append(len(chosen) == 1)
    found = asked()
    assert found["chosen"] == pytest.approx([n / 18 for n in letters])
    assert found["consistent"] == pytest.approx(sum(options) / 6)
    assert asked(batch_size=1) == found


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "choices": ["a", "b"]}, "line 1: gold missing"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "line 1: gold must be the number of an option"),
        ({"query": 5, "choices": ["a", "b"], "gold": 1}, "query must be a text, got 5"),
        ({"query": "q", "choices": list("abcdefghijk"), "gold": 0}, "at most 10 options"),
    ],
)
def test_wrong_questions_are_named(asked: Any, tmp_path: Any, row: dict[str, Any], message: str) -> None:
    file = tmp_path / "wrong.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        asked(questions=str(file))
    with pytest.raises(UserError, match="does not exist"):
        asked(questions=str(tmp_path / "none.jsonl"))


def test_default_questions_fit_any_tokenizer(pico_model: Any, pico_tokenizer: Any) -> None:
    subject = SimpleNamespace(tokenizer=pico_tokenizer, text=TEXT)
    import random

    first, again = (option_permutation._about_facts(subject, random.Random("0:1")) for _ in range(2))
    assert first == again and first.choices[first.gold] in first.query
    assert sum(choice in first.query for choice in first.choices) == 1
