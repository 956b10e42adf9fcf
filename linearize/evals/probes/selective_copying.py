"""Selective copying: words in brackets stand in ordinary text and are to be repeated in order.

Mamba (arXiv:2312.00752, section 3.1), with text in place of blank tokens. What has to be kept is marked when it is
read, at irregular distances: a state that takes in everything alike loses it. Exact match of the whole list; a wrong
candidate has two words exchanged.
"""

from __future__ import annotations

import random
from typing import Any

from pydantic import Field

from linearize.evals.recall import WORDS
from linearize.evals.synthetic.items import Puzzle
from linearize.evals.synthetic.probe import SyntheticConfig, SyntheticProbe
from linearize.evals.synthetic.words import listed, two_exchanged


class SelectiveCopyingConfig(SyntheticConfig):
    """Settings."""

    words: int = Field(8, ge=2, le=len(WORDS), description="Words to copy; Mamba: 16 tokens.")


class SelectiveCopying(SyntheticProbe):
    """Words spread over the text, repeated in order."""

    Config = SelectiveCopyingConfig
    title = "Selective copying"

    def write(self, rng: random.Random, case: Any, size: int) -> Puzzle:
        """Different words, each in brackets."""
        words = rng.sample(WORDS, self.config.words)
        return Puzzle(
            context=[f" [{word}]" for word in words],
            question="\nThe words in brackets, in their order, are",
            answer=f" {listed(words)}.",
            wrong=[f" {listed(wrong)}." for wrong in two_exchanged(words, rng)],
            references=[listed(words)],
        )
