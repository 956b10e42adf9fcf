"""Intervals and tests against formulas written out here, and what must hold for any counts."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from linearize.evals.statistics import Paired, interval_of_mean, mcnemar_exact, wilson


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


@pytest.mark.parametrize(("wins", "losses"), [(5000, 5100), (480, 620), (0, 900), (7, 7)])
def test_mcnemar_of_many_questions_is_the_same_sum(wins: int, losses: int) -> None:
    n, total, ways = wins + losses, 0, 1
    for k in range(min(wins, losses) + 1):
        total, ways = total + ways, ways * (n - k) // (k + 1)
    assert mcnemar_exact(wins, losses) == pytest.approx(min(1.0, 2 * total / 2**n), rel=1e-12)


def test_mcnemar_beyond_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [mcnemar_exact(*counts) for counts in ((3, 9), (9000, 9200), (40, 70))]
    monkeypatch.setattr("linearize.evals.statistics.EXACT_TOSSES", 0)
    found = [mcnemar_exact(*counts) for counts in ((3, 9), (9000, 9200), (40, 70))]
    assert found == pytest.approx(expected, rel=1e-9)


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


def test_the_interval_of_a_mean() -> None:
    one, other = Paired(10, 4, 0, 6), Paired(3, 2, 9, 36)
    assert interval_of_mean([one]) == pytest.approx(one.interval())
    (l1, u1), (l2, u2), (d1, d2) = one.interval(), other.interval(), (4 / 20, -7 / 50)
    low = (d1 + d2) / 2 - math.sqrt((d1 - l1) ** 2 + (d2 - l2) ** 2) / 2
    high = (d1 + d2) / 2 + math.sqrt((u1 - d1) ** 2 + (u2 - d2) ** 2) / 2
    assert interval_of_mean([one, other]) == pytest.approx((low, high))


def test_the_interval_of_a_mean_covers_what_it_says() -> None:
    """Four tasks of 50 questions, 600 times, few of them answered differently."""
    rng = random.Random(0)
    shares = [(0.3, 0.04, 0.02, 0.64), (0.2, 0.03, 0.05, 0.72), (0.5, 0.1, 0.1, 0.3), (0.1, 0.02, 0.02, 0.86)]
    true = sum(wins - losses for _, wins, losses, _ in shares) / 4
    covered = 0
    for _ in range(600):
        drawn = [rng.choices(range(4), weights, k=50) for weights in shares]
        low, high = interval_of_mean([Paired(*(answers.count(i) for i in range(4))) for answers in drawn])
        covered += low <= true <= high
    assert covered / 600 > 0.93


def test_wins_alone_do_not_prove_a_difference() -> None:
    """Four wins of 250 questions and no loss, which McNemar's test gives p = 0.125."""
    low, _ = interval_of_mean([Paired(20, wins, 0, 30 - wins) for wins in (1, 0, 1, 0, 2)])
    assert low < 0 and mcnemar_exact(4, 0) == 0.125
