"""Several needles, all asked at once; RULER's multi-query NIAH (arXiv:2404.06654, section 3).

The score is the share of the numbers that the answer names. A wrong candidate has two numbers exchanged, so the
likelihood asks whose each number is, which the score, as RULER's, does not.
"""

from __future__ import annotations

import random
from typing import Any

from pydantic import Field

from linearize.evals.recall import FACT, WORDS, facts
from linearize.evals.synthetic.items import Puzzle
from linearize.evals.synthetic.probe import SyntheticConfig, SyntheticProbe
from linearize.evals.synthetic.words import listed, two_exchanged


class NiahMultiqueryConfig(SyntheticConfig):
    """Settings."""

    queries: int = Field(4, ge=2, le=len(WORDS), description="Words that have a number, all asked; RULER: 4.")


class NiahMultiquery(SyntheticProbe):
    """The numbers of several words, spread over the text."""

    Config = NiahMultiqueryConfig
    title = "Several needles asked at once (multi-query)"

    def write(self, rng: random.Random, case: Any, size: int) -> Puzzle:
        """As many facts as queries, asked in another order than they stand."""
        pairs = facts(self.config.queries, rng)
        asked = rng.sample(pairs, len(pairs))
        words, right = listed([word for word, _ in asked]), [number for _, number in asked]
        return Puzzle(
            context=[FACT.format(word=word, number=number) for word, number in pairs],
            question=f"\nWhat are the special numbers for {words}? The special numbers for {words} are",
            answer=f" {listed(right)}.",
            wrong=[f" {listed(wrong)}." for wrong in two_exchanged(right, rng)],
            references=right,
        )
