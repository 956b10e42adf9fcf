"""Grammar with gaps: a sequence that follows hidden rules, interrupted by words in brackets; how does it go on?

After SelectivBench (arXiv:2601.12598): a rule-based grammar and irregular gaps that break its transitions, written
here as text. Every question has an automaton of its own, in which the last `order` symbols decide the next one. The
rules stand nowhere; they are seen in the sequence, which runs through all that it needs, by a reader that leaves the
gaps out. Every symbol stands in the sequence and is the answer equally often, so `chance` is what guessing gives; a
reader who only counts gets more: with the defaults the rarest symbol is right in a third of the questions. With
`order: 1` the symbols take turns, and the answer is the one seen longest ago, whatever the rule; of two it would be the
one that is not the last, so that is refused.
"""

from __future__ import annotations

import random
from itertools import product
from typing import Any

from pydantic import Field, model_validator

from linearize.evals.recall import WORDS
from linearize.evals.synthetic.items import Puzzle
from linearize.evals.synthetic.probe import SyntheticConfig, SyntheticProbe
from linearize.evals.synthetic.words import WRONG


class GrammarConfig(SyntheticConfig):
    """Settings."""

    symbols: int = Field(4, ge=2, le=8, description="Words of the grammar.")
    order: int = Field(2, ge=1, le=3, description="Symbols that decide the next one.")
    gap: float = Field(0.5, ge=0, le=1, description="Probability of a gap of 1 to 3 words behind a symbol.")

    @model_validator(mode="after")
    def _takes_reading(self) -> GrammarConfig:
        if (self.symbols, self.order) == (2, 1):
            raise ValueError(
                "two symbols of order 1 take turns, which the last one gives away; got symbols=2 and order=1, set "
                "symbols to 3 or more, or order to 2 or 3"
            )
        return self


class Grammar(SyntheticProbe):
    """The next symbol of a sequence that fills the context."""

    Config = GrammarConfig
    title = "Grammar with gaps"
    smallest = 1

    def write(self, rng: random.Random, case: Any, size: int) -> Puzzle:
        """`size` symbols beyond those that show the rule; the wrong answers are other symbols."""
        words = rng.sample(WORDS, len(WORDS))
        symbols, noise = words[: self.config.symbols], words[self.config.symbols :]
        cycle: list[str] = []
        while {*cycle} != {*symbols}:
            cycle = longest_cycle(rules(symbols, self.config.order, rng))
        answer = rng.choice(symbols)
        end = rng.choice([i for i, symbol in enumerate(cycle) if symbol == answer])
        steps = len(cycle) + self.config.order + size
        seen = [cycle[(end - back) % len(cycle)] for back in range(steps - 1, 0, -1)]
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
