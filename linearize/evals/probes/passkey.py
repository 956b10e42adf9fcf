"""Passkey retrieval: one number, told twice in a row somewhere in ordinary text (arXiv:2305.16300).

The easiest of the tasks with a needle: nothing else in the text looks like it, so an exact match below 1 says from
where on nothing at all is remembered.
"""

from __future__ import annotations

import random
from typing import Any

from linearize.evals.synthetic.items import Puzzle
from linearize.evals.synthetic.probe import DepthProbe
from linearize.evals.synthetic.words import WRONG, numbers


class Passkey(DepthProbe):
    """Passkey retrieval at each length and depth."""

    title = "Passkey"

    def write(self, rng: random.Random, case: Any, size: int) -> Puzzle:
        """One pass key; the wrong answers are other numbers."""
        key, *wrong = numbers(1 + WRONG, rng)
        return Puzzle(
            context=[f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"],
            question="\nWhat is the pass key? The pass key is",
            answer=f" {key}.",
            wrong=[f" {number}." for number in wrong],
            references=[key],
            asked=0,
        )
