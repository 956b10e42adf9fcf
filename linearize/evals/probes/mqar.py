"""Multi-query associative recall: pairs of words in one block, and later what belongs to some of them.

Zoology (arXiv:2312.04927), whose synthetic sequences of random tokens are written here as words, for models that were
pretrained on text. As there, queries follow each other with their answers in between; the last is the one asked. The
block holds `pairs` at once with nothing in between, which is what a state's size limits.
"""

from __future__ import annotations

import random
from typing import Any

from pydantic import Field, model_validator

from linearize.evals.recall import WORDS
from linearize.evals.synthetic.items import Puzzle
from linearize.evals.synthetic.probe import DepthConfig, DepthProbe
from linearize.evals.synthetic.words import WRONG


class MqarConfig(DepthConfig):
    """Settings."""

    pairs: int = Field(16, ge=2, le=len(WORDS) // 2, description="Pairs in the block.")
    queries: int = Field(4, ge=1, description="Queries in a row, all answered but the last, which is asked.")

    @model_validator(mode="after")
    def _queries_are_pairs(self) -> MqarConfig:
        if self.queries > self.pairs:
            raise ValueError(f"queries must be at most pairs, got {self.queries} and {self.pairs}")
        return self


class Mqar(DepthProbe):
    """One value out of a block of pairs, for each length and depth of the block."""

    Config = MqarConfig
    title = "Associative recall (MQAR)"

    def write(self, rng: random.Random, case: Any, size: int) -> Puzzle:
        """Pairs of different words; the wrong answers are values of other keys."""
        words = rng.sample(WORDS, 2 * self.config.pairs)
        pairs = list(zip(words[::2], words[1::2], strict=True))
        *told, (key, value) = rng.sample(pairs, self.config.queries)
        others = [other for _, other in pairs if other != value]
        return Puzzle(
            context=["\n", *(f"{k} is {v}.\n" for k, v in pairs)],
            question="\n" + "".join(f"{k} is {v}.\n" for k, v in told) + f"{key} is",
            answer=f" {value}.",
            wrong=[f" {other}." for other in rng.sample(others, min(WRONG, len(others)))],
            references=[value],
            together=True,
        )
