"""Groups of lm-evaluation-harness tasks under one name, and which metric of a task stands for it.

`linearize evaluate DIR --tasks commonsense` runs the tasks of the group and adds their mean. `mmlu` and other groups of
the harness work by their own names and keep its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

GROUPS: dict[str, tuple[str, ...]] = {
    "commonsense": ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande"),
}
"""Name -> tasks; a new group is one more line."""

MAIN_METRICS = ("acc_norm", "acc", "exact_match", "word_perplexity", "perplexity", "f1", "mcc", "mean")
"""Metrics that stand for a task, the first that it has; `mean` is what groups get here."""
SHARES = ("acc_norm", "acc", "exact_match", "f1", "mcc")
"""Those of which a mean over tasks makes sense."""


def expand(tasks: Iterable[str]) -> list[str]:
    """The tasks, each group of ours replaced by what is in it; none twice."""
    return list(dict.fromkeys(name for task in tasks for name in GROUPS.get(task, (task,))))


def asked_groups(tasks: Iterable[str]) -> dict[str, list[str]]:
    """Those of the names that are groups of ours, with their tasks."""
    return {task: list(GROUPS[task]) for task in tasks if task in GROUPS}


def leaves(groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Groups of the harness, which may hold groups, with the tasks in them."""

    def below(name: str) -> list[str]:
        return [leaf for child in groups[name] for leaf in below(child)] if name in groups else [name]

    return {group: list(dict.fromkeys(below(group))) for group in groups}


def main_metric(metrics: Mapping[str, float] | Iterable[str]) -> str | None:
    """The metric that stands for a task; one of a filter (`exact_match,strict-match`) where there is no plain one."""
    names = [name for name in metrics if "_stderr" not in name]
    for wanted in MAIN_METRICS:
        if wanted in names:
            return wanted
    return next((name for wanted in MAIN_METRICS for name in names if name.split(",")[0] == wanted), None)


def group_mean(tasks: Sequence[str], results: Mapping[str, Mapping[str, float]]) -> float | None:
    """Unweighted mean of each task's main metric; None where one has no share of right answers, but a perplexity."""
    values = []
    for task in tasks:
        metric = main_metric(results.get(task, {}))
        if metric is None or metric.split(",")[0] not in SHARES:
            return None
        values.append(results[task][metric])
    return sum(values) / len(values) if values else None
