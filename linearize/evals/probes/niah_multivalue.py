"""Several needles for one word: all its numbers are asked; RULER's multi-value NIAH (arXiv:2404.06654, section 3).

The score is the share of the numbers that the answer names. A wrong candidate has one number that is not in the text.
"""

from __future__ import annotations

import random
from typing import Any

from pydantic import Field

from linearize.evals.recall import FACT, WORDS
from linearize.evals.synthetic.items import Puzzle
from linearize.evals.synthetic.probe import SyntheticConfig, SyntheticProbe
from linearize.evals.synthetic.words import WRONG, listed, numbers, one_changed


class NiahMultivalueConfig(SyntheticConfig):
    """Settings."""

    values: int = Field(4, ge=2, description="Numbers of the word; RULER: 4.")


class NiahMultivalue(SyntheticProbe):
    """All numbers of one word, spread over the text."""

    Config = NiahMultivalueConfig
    title = "Several needles of one word (multi-value)"

    def write(self, rng: random.Random, case: Any, size: int) -> Puzzle:
        """One word's facts; the answer lists the numbers in the order of the text."""
        word, n = rng.choice(WORDS), self.config.values
        drawn = numbers(n + WRONG, rng)
        right, others = drawn[:n], drawn[n:]
        return Puzzle(
            context=[FACT.format(word=word, number=number) for number in right],
            question=f"\nWhat are all the special numbers for {word}? The special numbers for {word} are",
            answer=f" {listed(right)}.",
            wrong=[f" {listed(wrong)}." for wrong in one_changed(right, others, rng)],
            references=right,
        )
