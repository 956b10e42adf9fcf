"""Statistics of counted answers: intervals of shares, and one model against another on the same questions.

`wilson(right, n)` is for a single model; `Paired.of(student, teacher)` counts two models' answers to the same questions
and gives the difference with its interval and the exact McNemar test. Pure functions of counts, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Z95 = 1.96
"""Standard normal quantile of two-sided 95% intervals."""
EXACT_TOSSES = 20_000
"""Most tosses whose binomial coefficient is taken in integers, in some milliseconds."""


def wilson(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a proportion; z = 1.96 for 95% (Wilson 1927)."""
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided exact McNemar test: how likely a split at least as uneven is if both models are equally good.

    Questions that both answer alike say nothing; the others are tosses of a fair coin, Binomial(wins + losses, 1/2)
    (McNemar 1947). No approximation at any number of questions; what is rounded are floats.
    """
    n, k = wins + losses, min(wins, losses)
    # The sum of C(n, i) over i <= k in units of its largest term, whose neighbours are quotients; the rest is nothing.
    tail = term = 1.0
    while k and term > 1e-17 * tail:
        term *= k / (n - k + 1)
        tail += term
        k -= 1
    return min(1.0, 2 * tail * _share_of_tosses(n, min(wins, losses)))


def _share_of_tosses(n: int, k: int) -> float:
    """C(n, k) / 2^n: of integers up to `EXACT_TOSSES`, to the last bit; beyond by log gamma, at 10^6 off by 1e-9."""
    if n <= EXACT_TOSSES:
        return math.comb(n, k) / 2**n
    return math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))


@dataclass(frozen=True)
class Paired:
    """How two models did on the same questions."""

    both: int
    """Answered right by both."""
    wins: int
    """Right by the first alone."""
    losses: int
    """Right by the second alone."""
    neither: int

    @classmethod
    def of(cls, first: Iterable[bool], second: Iterable[bool]) -> Paired:
        """Count the answers, right or wrong, of two models to the same questions in the same order.

        Raises:
            ValueError: when one has more answers than the other.
        """
        pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
        return cls(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def n(self) -> int:
        return self.both + self.wins + self.losses + self.neither

    @property
    def ties(self) -> int:
        return self.both + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of the first less that of the second."""
        return (self.wins - self.losses) / self.n

    @property
    def p_value(self) -> float:
        """Of the exact McNemar test, two-sided."""
        return mcnemar_exact(self.wins, self.losses)

    def interval(self, z: float = Z95) -> tuple[float, float]:
        """Interval of the difference between paired proportions, method 10 of Newcombe (1998), Statistics in Medicine
        17:2635-2650: the Wilson intervals of both, joined with the correlation of the answers. z = 1.96 for 95%.
        """
        right = (self.both + self.wins, self.both + self.losses)
        p, q = (count / self.n for count in right)
        (low_p, high_p), (low_q, high_q) = (wilson(count, self.n, z) for count in right)
        phi = self._correlation()
        below, above = ((p - low_p), (high_q - q)), ((high_p - p), (q - low_q))
        down, up = (math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b)) for a, b in (below, above))
        return self.difference - down, self.difference + up

    def _correlation(self) -> float:
        """Phi of the two-by-two table, less the continuity correction of Newcombe's method 10."""
        margins = math.prod((self.both + self.wins, self.both + self.losses))
        margins *= math.prod((self.losses + self.neither, self.wins + self.neither))
        if margins == 0:
            return 0.0
        excess: float = self.both * self.neither - self.wins * self.losses
        if excess > 0:
            excess = max(excess - self.n / 2, 0.0)
        return excess / math.sqrt(margins)


def interval_of_mean(parts: Sequence[Paired]) -> tuple[float, float]:
    """95% interval of the unweighted mean of independent tasks' differences.

    The distances from each difference to the ends of its interval add in squares (the MOVER method of Zou and Donner
    2008, Statistics in Medicine 27:1693-1702). A bootstrap would not do: with no question lost, no draw has one either.
    """
    mean = sum(part.difference for part in parts) / len(parts)
    ends = [(part.difference, *part.interval()) for part in parts]
    below = math.sqrt(sum((difference - low) ** 2 for difference, low, _ in ends)) / len(parts)
    above = math.sqrt(sum((high - difference) ** 2 for difference, _, high in ends)) / len(parts)
    return mean - below, mean + above
