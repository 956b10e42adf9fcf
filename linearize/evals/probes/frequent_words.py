"""Frequent words: made-up words whose frequencies fall as a Zeta distribution; which are the most frequent?

RULER's aggregation task FWE (arXiv:2404.06654, section 3). Unlike in `common_words` the asked words differ in
frequency, and the longer the context, the more often each stands. The counts are the expected ones rather than drawn,
so that the answer has no ties.
"""

from __future__ import annotations

import random
from typing import Any

from pydantic import Field

from linearize.evals.synthetic.items import Puzzle
from linearize.evals.synthetic.probe import SyntheticConfig, SyntheticProbe
from linearize.evals.synthetic.words import WRONG, coded_words, listed, one_changed


class FrequentWordsConfig(SyntheticConfig):
    """Settings."""

    alpha: float = Field(
        2.0, gt=1, le=4, description="Exponent: the k-th word stands in proportion to k^-alpha; RULER: 2."
    )


class FrequentWords(SyntheticProbe):
    """The three most frequent words of a text of made-up words that fills the context."""

    Config = FrequentWordsConfig
    title = "Frequent words"
    smallest = 2
    asked = 3

    def write(self, rng: random.Random, case: Any, size: int) -> Puzzle:
        """Words whose third-ranked stands `size` times; the wrong answers have one that stands less often."""
        counts = frequencies(size, self.asked, self.config.alpha)
        words = coded_words(len(counts), rng)
        entries = rng.sample(words, sum(counts), counts=counts)
        right = words[: self.asked]
        return Puzzle(
            context=["\nCoded text:", *(f" {word}" for word in entries), "\n"],
            question="\nWhich three words are the most frequent in the coded text? The three most frequent words are",
            answer=f" {listed(right)}.",
            wrong=[f" {listed(wrong)}." for wrong in one_changed(right, words[self.asked :], rng)],
            references=right,
            together=True,
        )


def frequencies(size: int, rank: int, alpha: float) -> list[int]:
    """How often each word stands: in proportion to k^-alpha, `size` times that of the given rank, until less than once.

    Words behind that rank stand less often than it, and there are at least `WRONG` of them.
    """
    counts, k = [], 1
    while (count := int(size * (rank / k) ** alpha)) >= 1 or k <= rank + WRONG:
        counts.append(max(1, count if k <= rank else min(count, size - 1)))
        k += 1
    return counts
