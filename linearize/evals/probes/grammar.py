"""Grammar with gaps: a sequence that follows hidden rules, interrupted by words in brackets; how does it go on?

After SelectivBench (arXiv:2601.12598): a rule-based grammar and irregular gaps that break its transitions, written
here as text. Every question has an automaton of its own, in which the last `order` symbols decide the next one. The
rules stand nowhere; they are seen in the sequence, which runs through all that it needs, by a reader that leaves the
gaps out.
"""

from __future__ import annotations

import random
from itertools import product
from typing import Any

from pydantic import Field

from linearize.evals.recall import WORDS
from linearize.evals.synthetic import SyntheticConfig, SyntheticProbe
from linearize.evals.synthetic_items import Puzzle
from linearize.evals.synthetic_words import WRONG


class GrammarConfig(SyntheticConfig):
    """Settings."""

    symbols: int = Field(4, ge=2, le=8, description="Words of the grammar.")
    order: int = Field(2, ge=1, le=3, description="Symbols that decide the next one.")
    gap: float = Field(0.5, ge=0, le=1, description="Probability of a gap of 1 to 3 words behind a symbol.")


class Grammar(SyntheticProbe):
    """The next symbol of a sequence that fills the context."""

    Config = GrammarConfig
    title = "Grammar with gaps"
    smallest = 1

    def write(self, rng: random.Random, case: Any, size: int) -> Puzzle:
        """`size` symbols beyond those that show the rule; the wrong answers are other symbols."""
        words = rng.sample(WORDS, len(WORDS))
        symbols, noise = words[: self.config.symbols], words[self.config.symbols :]
        cycle = longest_cycle(rules(symbols, self.config.order, rng))
        walk = [cycle[i % len(cycle)] for i in range(len(cycle) + self.config.order + size)]
        *seen, answer = walk
        context = ["\nSequence:"]
        for symbol in seen:
            context.append(f" {symbol}")
            if rng.random() < self.config.gap:
                context += [f" ({word})" for word in rng.choices(noise, k=rng.randint(1, 3))]
        others = [symbol for symbol in symbols if symbol != answer]
        return Puzzle(
            context=[*context, "\n"],
            question="\nWithout the words in brackets, the next word of the sequence is",
            answer=f" {answer}.",
            wrong=[f" {symbol}." for symbol in rng.sample(others, min(WRONG, len(others)))],
            references=[answer],
            together=True,
        )


def rules(symbols: list[str], order: int, rng: random.Random) -> dict[tuple[str, ...], str]:
    """What follows each sequence of `order` symbols; no two of them lead to the same, so every walk comes round."""
    found = {}
    for rest in product(symbols, repeat=order - 1):
        for first, follows in zip(symbols, rng.sample(symbols, len(symbols)), strict=True):
            found[(first, *rest)] = follows
    return found


def longest_cycle(follows: dict[tuple[str, ...], str]) -> list[str]:
    """The symbols of the longest walk that comes back to where it began, once round."""
    cycles, left = [], dict.fromkeys(follows)
    while left:
        start = state = next(iter(left))
        cycle: list[str] = []
        while not cycle or state != start:
            del left[state]
            cycle.append(state[0])
            state = (*state[1:], follows[state])
        cycles.append(cycle)
    return max(cycles, key=len)
