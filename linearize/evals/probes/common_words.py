"""Common words: a list in which a few words stand many times and all others seldom; which are the few?

RULER's aggregation task CWE (arXiv:2404.06654, section 3): the whole context has to be counted, no place in it tells.
Rare words are added until the length is reached. By default the list is shorter than RULER's (10 words 30 times,
others 3 times), so that it fits some hundred tokens; its words are made up.
"""

from __future__ import annotations

import random
from typing import Any

from pydantic import Field, model_validator

from linearize.evals.synthetic.items import Puzzle
from linearize.evals.synthetic.probe import SyntheticConfig, SyntheticProbe
from linearize.evals.synthetic.words import coded_words, listed, one_changed


class CommonWordsConfig(SyntheticConfig):
    """Settings."""

    common: int = Field(4, ge=1, description="Common words, all asked; RULER: 10.")
    repeats: int = Field(10, ge=2, description="How often each stands in the list; RULER: 30.")
    rare_repeats: int = Field(1, ge=1, description="How often every other word does; RULER: 3.")

    @model_validator(mode="after")
    def _common_is_more(self) -> CommonWordsConfig:
        if self.repeats <= self.rare_repeats:
            raise ValueError(f"repeats must be more than rare_repeats, got {self.repeats} and {self.rare_repeats}")
        return self


class CommonWords(SyntheticProbe):
    """The words that stand most often in a list that fills the context."""

    Config = CommonWordsConfig
    title = "Common words"
    smallest = 3

    def write(self, rng: random.Random, case: Any, size: int) -> Puzzle:
        """A list with `size` rare words; a wrong answer has one of them."""
        few = self.config.common
        words = coded_words(few + size, rng)
        counts = [self.config.repeats] * few + [self.config.rare_repeats] * size
        entries = rng.sample(words, sum(counts), counts=counts)
        right = words[:few]
        return Puzzle(
            context=["\nList of words:", *(f" {word}" for word in entries), "\n"],
            question="\nWhich words are the most common in the list? The most common words in the list are",
            answer=f" {listed(right)}.",
            wrong=[f" {listed(wrong)}." for wrong in one_changed(right, words[few:], rng)],
            references=right,
            together=True,
        )
