"""Words, numbers and lists of them for the puzzles of `linearize.evals.synthetic`, from a random generator alone."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from itertools import combinations

WRONG = 3
"""Wrong answers beside the right one, where a task does not have fewer."""
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def numbers(n: int, rng: random.Random) -> list[str]:
    """`n` different numbers of five digits."""
    return [str(number) for number in rng.sample(range(10_000, 100_000), n)]


def coded_words(n: int, rng: random.Random) -> list[str]:
    """`n` different words of three syllables (at most 343,000) that mean nothing."""
    syllables = [c + v for c in CONSONANTS for v in VOWELS]
    k = len(syllables)
    return [syllables[i // k // k] + syllables[i // k % k] + syllables[i % k] for i in rng.sample(range(k**3), n)]


def names(n: int, rng: random.Random) -> list[str]:
    """`n` different names of five capital letters."""
    found: dict[str, None] = {}
    while len(found) < n:
        found["".join(rng.choices(string.ascii_uppercase, k=5))] = None
    return list(found)


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([part for part in (", ".join(words[:-1]), words[-1]) if part])


def one_changed(words: Sequence[str], others: Sequence[str], rng: random.Random) -> list[list[str]]:
    """At most `WRONG` different lists, each `words` with one of the `others` in a random place."""
    changed = []
    for other in rng.sample(others, min(WRONG, len(others))):
        place = rng.randrange(len(words))
        changed.append([*words[:place], other, *words[place + 1 :]])
    return changed


def two_exchanged(words: Sequence[str], rng: random.Random) -> list[list[str]]:
    """At most `WRONG` different lists, each `words` with two of them exchanged."""
    pairs = list(combinations(range(len(words)), 2))
    changed = []
    for i, j in rng.sample(pairs, min(WRONG, len(pairs))):
        order = list(words)
        order[i], order[j] = order[j], order[i]
        changed.append(order)
    return changed
