"""Views of the measurements that every conversion takes: losses, branches switched off, recall, divergence, tasks."""

from __future__ import annotations

from collections.abc import Mapping

from linearize.evals.measure import Measurement
from linearize.evals.table import case_name, union
from linearize.evals.views import Bars, Lines, Number, View

Curves = dict[str, list[tuple[float, float]]]


def standard_views(measurements: Mapping[str, Measurement]) -> list[View]:
    """What to show of several models, or several points of one; nothing where nothing was measured.

    Args:
        measurements: name of the model -> what was measured on it.
    """
    m = measurements
    views: list[View] = []
    if len(union(point.length for found in m.values() for point in found.losses)) > 1:
        curves: Curves = {name: [(p.length, p.loss) for p in x.losses] for name, x in m.items() if x.losses}
        views.append(_lines("Loss by context length", curves, x_label="tokens of context", y_label="nats per token"))
    for length in union(point.length for found in m.values() for point in found.losses):
        curves = {
            name: [(end, loss) for _, end, loss in point.by_position]
            for name, found in m.items()
            for point in found.losses
            if point.length == length
        }
        title = f"Loss by position in {length:,} tokens"
        views.append(_lines(title, curves, x_label="position (tokens, up to)", y_label="nats per token"))
    for length in union(loss.length for found in m.values() for loss in found.branches):
        labels = ["all branches", *union(f"{b.branch} off" for found in m.values() for b in found.branches)]
        heights = {name: _branches(found, labels, length) for name, found in m.items()}
        note = "A branch whose absence does not raise the loss does not help."
        title = f"Loss with a branch switched off, {length:,} tokens"
        views.append(Bars(title, note, y_label="nats per token", labels=labels, series=heights))
    cases = union((score.facts, score.distance) for found in m.values() for score in found.recall)
    if cases:
        rates = {name: [found.recall_rate(*case) for case in cases] for name, found in m.items()}
        note = "Facts to remember / tokens between them and the question."
        labels = [case_name(case) for case in cases]
        views.append(Bars("Recall", note, y_label="share of right answers", labels=labels, series=rates))
    lengths = union(d.length for found in m.values() for d in found.divergence)
    if lengths:
        apart = {name: [_kl(found, length) for length in lengths] for name, found in m.items() if found.divergence}
        labels = [f"{length:,} tokens" for length in lengths]
        title = "KL(teacher || student)"
        views.append(Bars(title, y_label="nats per token", labels=labels, series=apart))
    return views


def _lines(title: str, curves: Curves, *, x_label: str, y_label: str) -> Lines:
    return Lines(title, x_label=x_label, y_label=y_label, series=curves, log_x=True)


def _branches(found: Measurement, labels: list[str], length: int) -> list[Number]:
    return [found.loss(length), *(found.branch_loss(label.removesuffix(" off"), length) for label in labels[1:])]


def _kl(found: Measurement, length: int) -> Number:
    apart = found.diverges(length)
    return None if apart is None else apart.kl
