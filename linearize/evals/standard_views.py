"""Views of the measurements that are always taken, for pages that show several models side by side.

`standard_views({"teacher": ..., "student": ...})` gives them; the views of probes come from the probes themselves. What
no model has been measured on is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from linearize.evals.measure import Measurement
from linearize.evals.table import case_name, percent, union
from linearize.evals.views import Bars, Lines, Number, Table, View

Measurements = Mapping[str, Measurement]


def standard_views(measurements: Measurements) -> list[View]:
    """What to show of the standing measurements.

    Args:
        measurements: name of the model -> what was measured on it, in the order to be shown.

    Returns:
        Losses by length and by position, what each branch is worth, distance from the teacher, recall, and
        for encoders agreement with the teacher; of these what any of the models has.
    """
    views = [*_losses(measurements), *_branches(measurements), *_divergences(measurements)]
    return [*views, *_recall(measurements), *_agreements(measurements)]


def _curves(measurements: Measurements, points: Callable[[Measurement], Iterable[tuple[float, float]]]) -> dict:
    found = {name: sorted((x, y) for x, y in points(m) if math.isfinite(y)) for name, m in measurements.items()}
    return {name: curve for name, curve in found.items() if curve}


def _bars(
    measurements: Measurements, labels: Mapping[Any, str], value: Callable[[Measurement, Any], Number]
) -> dict[str, Any]:
    """Labels, and for each model that has any of the values its bars."""
    series = {name: [_finite(value(m, key)) for key in labels] for name, m in measurements.items()}
    shown = {name: heights for name, heights in series.items() if any(height is not None for height in heights)}
    return {"labels": list(labels.values()), "series": shown}


def _finite(value: Number) -> Number:
    """None for what a model that broke in training gives."""
    return value if value is not None and math.isfinite(value) else None


def _losses(measurements: Measurements) -> list[View]:
    lengths = union(point.length for m in measurements.values() for point in m.losses)
    if not lengths:
        return []
    longest = max(lengths)

    def positions(m: Measurement) -> list[tuple[float, float]]:
        return [(end, loss) for p in m.losses if p.length == longest for _, end, loss in p.by_position]

    return [
        Bars(
            "Loss by context length",
            "Held-out text, next token. Longer contexts help a model that uses them.",
            y_label="nats per token",
            **_bars(measurements, {n: f"{n:,} tokens" for n in sorted(lengths)}, Measurement.loss),
        ),
        Lines(
            f"Loss by position in {longest:,} tokens",
            "A curve that stops falling where others go on belongs to a model that does not reach further back.",
            x_label="position (tokens, up to)",
            y_label="nats per token",
            series=_curves(measurements, positions),
            log_x=True,
        ),
    ]


def _branches(measurements: Measurements) -> list[View]:
    branches = union(found.branch for m in measurements.values() for found in m.branches)
    lengths = sorted(union(found.length for m in measurements.values() for found in m.branches))

    def rise(m: Measurement, pair: tuple[str, int]) -> Number:
        off, whole = m.branch_loss(*pair), m.loss(pair[1])
        return None if off is None or whole is None else off - whole

    return [  # a figure each: on one scale, a window of which much depends hides what the linear branch does
        Bars(
            f"What the {branch} branch is worth",
            f"Rise of the loss when the {branch} branch of all mixers is off; at 0 or below it does not help.",
            y_label="nats per token",
            **_bars(measurements, {(branch, n): f"{n:,} tokens" for n in lengths}, rise),
        )
        for branch in branches
    ]


def _divergences(measurements: Measurements) -> list[View]:
    lengths = sorted(union(found.length for m in measurements.values() for found in m.divergence))
    if not lengths:
        return []
    labels = {n: f"{n:,} tokens" for n in lengths}

    def of(key: str) -> Callable[[Measurement, int], Number]:
        return lambda m, length: getattr(m.diverges(length), key, None)

    return [
        Bars(
            "KL to the teacher",
            "KL(teacher || student) on held-out text.",
            y_label="nats per token",
            **_bars(measurements, labels, of("kl")),
        ),
        Bars(
            "Same likeliest token as the teacher",
            y_label="share of positions",
            **_bars(measurements, labels, of("same")),
        ),
    ]


def _recall(measurements: Measurements) -> list[View]:
    asked = [(name, score) for name, m in measurements.items() for score in m.recall]
    cases = union((s.facts, s.distance) for _, s in asked if s.exact_match is not None)
    if not cases:
        return []

    def rate(m: Measurement, case: tuple[int, int]) -> Number:
        return None if (share := m.recall_rate(*case)) is None else 100 * share

    rows: list[list[str | Number]] = [
        [name, case_name((s.facts, s.distance)), *map(percent, (s.exact_match, s.low, s.high)), str(s.n)]
        for name, s in asked
        if s.exact_match is not None
    ]
    return [
        Bars(
            "Recall",
            "Facts hidden in text, asked for some tokens later. Those beyond a window are found through a state or a "
            "softmax layer, or not at all.",
            y_label="percent of answers right",
            **_bars(measurements, {case: f"{case_name(case)} tokens" for case in cases}, rate),
        ),
        Table(
            "Recall with 95% intervals",
            columns=["", "facts/tokens between", "right", "from", "to", "questions"],
            rows=rows,
        ),
    ]


def _agreements(measurements: Measurements) -> list[View]:
    lengths = sorted(union(found.length for m in measurements.values() for found in m.agreement))
    if not lengths:
        return []

    def cosine(m: Measurement, key: tuple[str, int]) -> Number:
        return getattr(m.agrees(key[1]), key[0], None)

    labels = {(kind, n): f"{kind}s, {n:,} tokens" for n in lengths for kind in ("embedding", "token")}
    return [
        Bars(
            "Agreement of the encoder with its teacher",
            "Mean cosine of last hidden states.",
            y_label="cosine",
            **_bars(measurements, labels, cosine),
        )
    ]
