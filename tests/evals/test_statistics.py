"""Intervals and tests against formulas written out here, and what must hold for any counts."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from linearize.evals.statistics import Paired, bootstrap_mean_difference, mcnemar_exact, wilson


def test_wilson_solves_its_equation() -> None:
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    for right, n in ((5, 10), (0, 10), (10, 10), (123, 1000)):
        for end in wilson(right, n):
            # the ends are the p at which the observed share lies 1.96 standard errors away
            assert (right / n - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / n, abs=1e-12)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (3, 9), (9, 3), (12, 12), (40, 70)])
def test_mcnemar_sums_the_binomial(wins: int, losses: int) -> None:
    n, distance = wins + losses, abs(wins - losses)
    as_uneven = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= distance)
    assert mcnemar_exact(wins, losses) == pytest.approx(as_uneven / 2**n)


def test_counts() -> None:
    student, teacher = [1, 1, 0, 0, 1], [1, 0, 1, 0, 0]
    found = Paired.of(map(bool, student), map(bool, teacher))
    assert found == Paired(both=1, wins=2, losses=1, neither=1)
    assert found.n == 5 and found.ties == 2
    assert found.difference == pytest.approx(sum(student) / 5 - sum(teacher) / 5)
    with pytest.raises(ValueError):
        Paired.of([True], [True, False])


def newcombe(e: int, f: int, g: int, h: int) -> tuple[float, float]:
    """Method 10 of Newcombe (1998) in the paper's letters, step by step."""
    n = e + f + g + h
    ends = []
    for count in (e + f, e + g):
        middle = 2 * count + 1.96**2
        root = 1.96 * math.sqrt(1.96**2 + 4 * count * (n - count) / n)
        ends.append(
            (count / n - (middle - root) / (2 * (n + 1.96**2)), (middle + root) / (2 * (n + 1.96**2)) - count / n)
        )
    (dl2, du2), (dl3, du3) = ends
    product = (e + f) * (g + h) * (e + g) * (f + h)
    c = e * h - f * g
    c = c - n / 2 if c > n / 2 else (0 if c >= 0 else c)
    phi = 0 if product == 0 else c / math.sqrt(product)
    theta = (f - g) / n
    delta = math.sqrt(dl2**2 - 2 * phi * dl2 * du3 + du3**2)
    epsilon = math.sqrt(du2**2 - 2 * phi * du2 * dl3 + dl3**2)
    return theta - delta, theta + epsilon


@pytest.mark.parametrize("cells", [(36, 12, 2, 0), (20, 12, 2, 16), (53, 0, 1, 0), (10, 9, 9, 10), (0, 4, 30, 0)])
def test_newcombe_against_the_paper(cells: tuple[int, int, int, int]) -> None:
    low, high = Paired(*cells).interval()
    assert (low, high) == pytest.approx(newcombe(*cells), abs=1e-9)
    both, wins, losses, neither = cells
    swapped = Paired(both, losses, wins, neither).interval()
    assert swapped == pytest.approx((-high, -low))  # the models change places
    assert -1 <= low <= Paired(*cells).difference <= high <= 1


def test_newcombe_covers_what_it_says() -> None:
    """Exact coverage for 25 questions: every possible table, weighted by its probability."""
    shares, n = (0.4, 0.15, 0.1, 0.35), 25
    covered = 0.0
    for a, b, c in itertools.product(range(n + 1), repeat=3):
        d = n - a - b - c
        if d < 0:
            continue
        ways = math.factorial(n) / math.prod(map(math.factorial, (a, b, c, d)))
        low, high = Paired(a, b, c, d).interval()
        if low <= shares[1] - shares[2] <= high:
            covered += ways * math.prod(p**k for p, k in zip(shares, (a, b, c, d), strict=True))
    assert 0.93 < covered < 0.99


def test_correlated_answers_narrow_the_interval() -> None:
    def width(cells: Paired) -> float:
        low, high = cells.interval()
        return high - low

    assert width(Paired(45, 5, 5, 45)) < 0.6 * width(Paired(25, 25, 25, 25))


def test_bootstrap_of_one_task_is_near_the_normal_interval() -> None:
    rng = random.Random(1)
    values = [rng.choice((-1, 0, 0, 1)) for _ in range(400)]
    mean = sum(values) / 400
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 400 / 400)
    low, high = bootstrap_mean_difference([values])
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * error)
    assert (low, high) == bootstrap_mean_difference([values]) != bootstrap_mean_difference([values], seed=1)


def test_bootstrap_weighs_tasks_alike() -> None:
    """A large task of ties beside a small one of wins: the mean of tasks is one half, whatever is drawn."""
    assert bootstrap_mean_difference([[0] * 500, [1] * 5], draws=50) == (0.5, 0.5)
