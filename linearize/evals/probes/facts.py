"""How many facts at once: 1, 4 and 8 special numbers stand anywhere in the text, and one of them is asked.

The usual recall cases place the first fact behind 24 tokens and ask over the whole distance where there is one; here
all stand uniformly at random and each is as likely to be asked, which comes nearest to the teachers' own figures.
The heat map has a row for each number of facts: where it darkens says what a state can hold.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from linearize.evals import recall
from linearize.evals.synthetic.items import Puzzle
from linearize.evals.synthetic.probe import SyntheticConfig, SyntheticProbe
from linearize.evals.synthetic.words import WRONG, numbers


class FactsConfig(SyntheticConfig):
    """Settings."""

    facts: list[Annotated[int, Field(ge=1, le=len(recall.WORDS))]] = Field(
        [1, 4, 8], min_length=1, description="Facts in the text, of one case after the other."
    )


class Facts(SyntheticProbe):
    """Each number of facts at each length."""

    Config = FactsConfig
    title = "Facts at once"
    axis = "facts"

    def cases(self) -> Sequence[int]:
        """Numbers of facts."""
        return self.config.facts

    def write(self, rng: random.Random, case: int, size: int) -> Puzzle:
        """The wrong answers are numbers of other facts, and where these are few, numbers that are not in the text."""
        pairs = recall.facts(case, rng)
        asked = rng.randrange(case)
        word, number = pairs[asked]
        others = [other for _, other in pairs if other != number]
        others += [other for other in numbers(WRONG + case, rng) if other not in {number, *others}]
        return Puzzle(
            context=[recall.FACT.format(word=w, number=n) for w, n in pairs],
            question=recall.QUESTION.format(word=word),
            answer=recall.ANSWER.format(number=number),
            wrong=[recall.ANSWER.format(number=other) for other in others[:WRONG]],
            references=[number],
        )
