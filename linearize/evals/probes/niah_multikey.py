"""Needle among needles: several words have numbers, one is asked; RULER's multi-key NIAH (arXiv:2404.06654, section 3).

The asked needle stands at the depth, the others anywhere. A model that finds numbers but mixes up whose they are
shows here and not in `niah_single`.
"""

from __future__ import annotations

import random
from typing import Any

from pydantic import Field

from linearize.evals.recall import ANSWER, FACT, QUESTION, facts
from linearize.evals.recall import WORDS as KNOWN
from linearize.evals.synthetic.items import Puzzle
from linearize.evals.synthetic.probe import DepthConfig, DepthProbe
from linearize.evals.synthetic.words import WRONG


class NiahMultikeyConfig(DepthConfig):
    """Settings."""

    keys: int = Field(4, ge=2, le=len(KNOWN), description="Words that have a number; RULER: 4.")


class NiahMultikey(DepthProbe):
    """One needle of several at each length and depth."""

    Config = NiahMultikeyConfig
    title = "Needle among needles (multi-key)"

    def write(self, rng: random.Random, case: Any, size: int) -> Puzzle:
        """`keys` facts, the first of them asked; the wrong answers are the numbers of the others."""
        (word, number), *others = facts(self.config.keys, rng)
        return Puzzle(
            context=[FACT.format(word=w, number=n) for w, n in [(word, number), *others]],
            question=QUESTION.format(word=word),
            answer=ANSWER.format(number=number),
            wrong=[ANSWER.format(number=n) for _, n in others[:WRONG]],
            references=[number],
            asked=0,
        )
