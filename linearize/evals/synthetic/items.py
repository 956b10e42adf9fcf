"""From a puzzle as text to tokens of an exact length: what the synthetic tasks of `linearize.evals.synthetic` share.

A task writes a `Puzzle`, a `Fitter` hides it in filler: `Fitter(tokenizer, filler).item(puzzle, length=2048, ...)`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from linearize.evals.recall import continuations, encode, leading_bos, stretch


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """One question as text, before it is fitted to a tokenizer and a length."""

    context: Sequence[str]
    """Pieces that stand in the filler, in their order in the prompt."""
    question: str
    """What follows the context; it ends where the answer begins."""
    answer: str
    """The right continuation, with the space that leads it and the stop that ends it."""
    wrong: Sequence[str]
    """Other continuations, which could be right for all that the question says."""
    references: Sequence[str]
    """What is looked for in generated text: a single one has to begin it, of several the share that it names counts."""
    asked: int | None = None
    """Index of the piece that a depth places, the others standing anywhere in any order; None: the order is kept."""
    together: bool = False
    """Whether the pieces follow each other without filler in between; a depth then places them all."""


@dataclass(frozen=True)
class Item:
    """One question as tokens."""

    input_ids: list[int]
    """The prompt."""
    candidates: list[list[int]]
    """Continuations, the right one first."""
    references: tuple[str, ...]
    """As those of the puzzle."""


class Fitter:
    """Hides puzzles in filler, for one tokenizer.

    Args:
        filler: tokens of ordinary text.
        twice: give the context, pieces and filler, twice before the question.
    """

    def __init__(self, tokenizer: Any, filler: Sequence[int], twice: bool = False):
        self.tokenizer, self.filler, self.copies = tokenizer, filler, 2 if twice else 1
        self.bos = leading_bos(tokenizer)
        self._tokens: dict[str, list[int]] = {}

    def tokens(self, piece: str) -> list[int]:
        """Tokens of a piece of context; tasks repeat them, so they are kept."""
        if piece not in self._tokens:
            self._tokens[piece] = encode(self.tokenizer, piece)
        return self._tokens[piece]

    def needed(self, puzzle: Puzzle) -> int:
        """Tokens that the puzzle takes without any filler, its longest answer included."""
        question, answers = self._ending(puzzle)
        context = sum(len(self.tokens(piece)) for piece in puzzle.context)
        return len(self.bos) + self.copies * context + len(question) + max(map(len, answers))

    def item(self, puzzle: Puzzle, length: int, rng: random.Random, depth: float | None = None) -> Item:
        """The puzzle in so much filler that prompt and longest answer have exactly `length` tokens.

        The filler is a contiguous stretch of n tokens, cut where the pieces stand: at random places, or behind
        `round(depth * n)` tokens. Where the context stands twice and the filler cannot be halved, one more token of it
        comes before both.
        """
        room = length - self.needed(puzzle)
        assert room >= 0, f"{length} tokens cannot hold {self.needed(puzzle)}"
        n, spare = divmod(room, self.copies)
        text = stretch(self.filler, n + spare, rng)
        lead, text = text[:spare], text[spare:]
        places = self._places(puzzle, n, rng, depth)
        order = sorted(range(len(places)), key=places.__getitem__)
        edges = [0, *(places[i] for i in order), n]
        body: list[int] = []
        for piece, (start, end) in zip(order, pairwise(edges[:-1]), strict=True):
            body += text[start:end] + self.tokens(puzzle.context[piece])
        body += text[edges[-2] :]
        question, answers = self._ending(puzzle)
        return Item([*self.bos, *lead, *body * self.copies, *question], answers, tuple(puzzle.references))

    def _ending(self, puzzle: Puzzle) -> tuple[list[int], list[list[int]]]:
        return continuations(self.tokenizer, puzzle.question, [puzzle.answer, *puzzle.wrong])

    def _places(self, puzzle: Puzzle, n: int, rng: random.Random, depth: float | None) -> list[int]:
        """How many tokens of filler stand before each piece."""
        at = rng.randint(0, n) if depth is None else round(depth * n)
        if puzzle.together:
            return [at] * len(puzzle.context)
        places = [rng.randint(0, n) for _ in puzzle.context]
        if puzzle.asked is None:
            return sorted(places)
        places[puzzle.asked] = at
        return places


def largest(fits: Callable[[int], bool], smallest: int) -> int:
    """The largest number from `smallest` that fits, where `smallest` does and all up to some number do."""
    low, high = smallest, 2 * smallest
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
