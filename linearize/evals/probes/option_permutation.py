"""Whether a model chooses an option for what it says or for where it stands.

Every question is asked with lettered options once for each rotation of them, and the likeliest letter counts (Zheng et
al. 2024, arXiv:2309.03882, on the bias towards letters). A model that understands chooses the same option in all.
Scores of tasks whose options are scored as continuations, such as PIQA or HellaSwag, do not depend on any order.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field, PositiveInt

from linearize.errors import UserError
from linearize.evals import recall
from linearize.evals.local_tasks import KINDS, read_rows
from linearize.evals.probes.base import DoesNotFit, Probe, ProbeConfig, Rows, Subject
from linearize.evals.synthetic.score import batches_of, log_likelihoods
from linearize.evals.views import Bars, Table, View
from linearize.schema import Seed

LETTERS = "ABCDEFGHIJ"
OPTIONS = 4
"""Of the questions about facts."""
FILLER = 32
"""Tokens of held-out text before each question about facts."""


class OptionPermutationConfig(ProbeConfig):
    """Settings."""

    questions: str | None = Field(
        None,
        description="JSONL file of questions with the fields query, choices and gold, all with as many options. "
        "Default: which of four numbers stands in a fact right before the question.",
    )
    items: PositiveInt = Field(16, description="Questions, each asked in every rotation of its options.")
    seed: Seed = Field(0, description="Seed of the default questions.")


@dataclass(frozen=True)
class Question:
    """A question and its options."""

    query: str
    choices: Sequence[str]
    gold: int
    """Index of the right option."""


@dataclass(frozen=True)
class Asked:
    """A question in one rotation, as tokens."""

    question: int
    rotation: int
    input_ids: list[int]
    candidates: list[list[int]]
    """The letters, in order."""


class OptionPermutation(Probe):
    """Accuracy, consistency and the bias towards letters."""

    Config = OptionPermutationConfig
    unit = "questions"

    def rows(self, seq_len: int) -> Rows:
        """The questions of its own, in all rotations; how long they are depends on the tokenizer."""
        return [(self.config.items * OPTIONS, 0)] if self.config.questions is None else []

    def check(self) -> None:
        """Read the file of questions."""
        if self.config.questions is not None:
            self._told(self.config.questions)

    def run(self, subject: Subject) -> dict[str, Any]:
        """`{"n", "options", "accuracy", "consistent", "chosen": [share of each letter], "right": [accuracy where the
        right option has that letter]}`.

        Raises:
            DoesNotFit: when a question is longer than the model's positions.
        """
        questions = self._questions(subject)
        n, options = len(questions), len(questions[0].choices)
        asked = [
            self._asked(subject, i, question, rotation)
            for i, question in enumerate(questions)
            for rotation in range(options)
        ]
        limit = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(len(a.input_ids) for a in asked) + 1
        if limit is not None and longest > limit:
            raise DoesNotFit(
                f"a question of option_permutation takes {longest} tokens and the model has {limit} positions; "
                "give shorter `questions`"
            )
        letters: dict[tuple[int, int], int] = {}
        for batch in batches_of(asked, subject.batch_size):
            for one, scores in zip(batch, log_likelihoods(subject.model, batch), strict=True):
                letters[one.question, one.rotation] = scores.index(max(scores))
        picked = {at: (letter + at[1]) % options for at, letter in letters.items()}  # the option, not its letter
        right = {at: float(option == questions[at[0]].gold) for at, option in picked.items()}
        same = [len({picked[i, rotation] for rotation in range(options)}) == 1 for i in range(n)]
        gold_at = {(i, r): (questions[i].gold - r) % options for i, r in letters}
        return {
            "n": n,
            "options": options,
            "accuracy": fmean(right.values()),
            "consistent": fmean(map(float, same)),
            "chosen": [fmean(float(letter == k) for letter in letters.values()) for k in range(options)],
            "right": [fmean(right[at] for at, k in gold_at.items() if k == letter) for letter in range(options)],
        }

    def _questions(self, subject: Subject) -> list[Question]:
        if self.config.questions is None:
            return [_about_facts(subject, random.Random(f"{self.config.seed}:{i}")) for i in range(self.config.items)]
        return self._told(self.config.questions)

    def _told(self, name: str) -> list[Question]:
        """The questions of a file."""
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"probes: option_permutation.questions={str(path)!r} does not exist; name a JSONL file")
        kind = KINDS["options"]
        found: list[Question] = []
        for number, row in enumerate(read_rows(path)[: self.config.items], 1):
            missing = [field for field in kind.fields if field not in row]
            reason = f"{', '.join(missing)} missing" if missing else kind.wrong(row)
            if reason is None and not isinstance(row["query"], str):
                reason = f"query must be a text, got {row['query']!r}"
            if reason is None and len(row["choices"]) > len(LETTERS):
                reason = f"at most {len(LETTERS)} options can be lettered, got {len(row['choices'])}"
            if reason is None and found and len(row["choices"]) != len(found[0].choices):
                reason = f"{len(row['choices'])} options, and {len(found[0].choices)} in the questions before"
            if reason is not None:
                raise UserError(f"probes: option_permutation.questions: {path}, line {number}: {reason}")
            found.append(Question(row["query"], row["choices"], row["gold"]))
        return found

    def _asked(self, subject: Subject, index: int, question: Question, rotation: int) -> Asked:
        """With `rotation` 1 the second option is A, and the first one has the last letter."""
        choices = [*question.choices[rotation:], *question.choices[:rotation]]
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS[: len(choices)], choices, strict=True)]
        prompt = "\n".join([question.query, *lines, "Answer:"])
        letters = [f" {letter}" for letter in LETTERS[: len(choices)]]
        ids, candidates = recall.continuations(subject.tokenizer, prompt, letters)
        return Asked(index, rotation, [*recall.leading_bos(subject.tokenizer), *ids], candidates)

    @classmethod
    def views(cls, results: Mapping[str, dict[str, Any]]) -> Sequence[View]:
        """Accuracy and consistency, and what each letter does."""
        rows = [
            [name, r["n"], r["options"], r["accuracy"], 1 / r["options"], r["consistent"]]
            for name, r in results.items()
        ]
        widest = max(r["options"] for r in results.values())
        bars = {
            key: {name: [*r[key], *[None] * (widest - r["options"])] for name, r in results.items()}
            for key in ("chosen", "right")
        }
        labels = list(LETTERS[:widest])
        note = "All bars are alike for a model that looks at what the options say."
        columns = ["model", "questions", "options", "accuracy over all rotations", "chance", "same option in all"]
        return [
            Table("Options in other orders", columns=columns, rows=rows),
            Bars("How often each letter is chosen", note, y_label="share", labels=labels, series=bars["chosen"]),
            Bars("Accuracy by the right option's letter", note, y_label="share", labels=labels, series=bars["right"]),
        ]


def _about_facts(subject: Subject, rng: random.Random) -> Question:
    told = recall.facts(OPTIONS, rng)
    gold = rng.randrange(OPTIONS)
    start = rng.randrange(max(1, len(subject.text) - FILLER))
    filler = subject.tokenizer.decode(subject.text[start : start + FILLER].tolist(), skip_special_tokens=True)
    word, number = told[gold]
    fact = recall.FACT.format(word=word, number=number)
    return Question(f"{filler}{fact}\nWhat is the special number for {word}?", [m for _, m in told], gold)
