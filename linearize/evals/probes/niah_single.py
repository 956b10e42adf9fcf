"""Needle in a haystack: the special number of one word, somewhere in ordinary text; RULER's single NIAH.

RULER: arXiv:2404.06654, section 3. Departures, in all `niah` tasks: the sentences are those that the demo teacher
knows, numbers have five digits rather than seven, and the haystack is the held-out text.
"""

from __future__ import annotations

import random
from typing import Any

from linearize.evals.recall import ANSWER, FACT, QUESTION, WORDS
from linearize.evals.synthetic.items import Puzzle
from linearize.evals.synthetic.probe import DepthProbe
from linearize.evals.synthetic.words import WRONG, numbers


class NiahSingle(DepthProbe):
    """One needle at each length and depth."""

    title = "Needle in a haystack"

    def write(self, rng: random.Random, case: Any, size: int) -> Puzzle:
        """One fact; the wrong answers are other numbers."""
        word = rng.choice(WORDS)
        number, *wrong = numbers(1 + WRONG, rng)
        return Puzzle(
            context=[FACT.format(word=word, number=number)],
            question=QUESTION.format(word=word),
            answer=ANSWER.format(number=number),
            wrong=[ANSWER.format(number=other) for other in wrong],
            references=[number],
            asked=0,
        )
