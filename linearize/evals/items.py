"""What a model answered to every question of a task, and how that compares with its teacher's answers.

`lm_eval_tasks` keeps an `Items` for each task that is right or wrong per question. `compare(student, teacher)` of two
measurements gives the share of questions on which both choose alike, wins and losses, the difference in accuracy with
its interval, and the exact McNemar test; `comparison_rows` are a table of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from linearize.errors import UserError
from linearize.evals.statistics import Paired, interval_of_mean, wilson
from linearize.evals.task_groups import main_metric


@dataclass(frozen=True)
class Items:
    """One model's answers to a task, compactly."""

    metric: str
    """The metric that says what is right: the task's main one."""
    right: str
    """A character for each question: 1 right, 0 wrong."""
    chosen: str = ""
    """What was chosen for each question, between spaces: the number of the option from 0, or a digest of what was
    written. Empty for tasks without options, such as LAMBADA."""
    documents: str = ""
    """Digest of the questions, in order: two models are compared only on the same."""

    def flags(self) -> list[bool]:
        """Right or wrong, question by question."""
        return [flag == "1" for flag in self.right]


@dataclass(frozen=True)
class Asked:
    """How a task was asked."""

    questions: int
    of: int | None
    """Questions that the task has; None where that is not known."""
    shots: int | None
    """Examples in the prompts; None in a group whose tasks differ."""
    own: bool
    """Whether the questions or the task file are the user's own, not those that the harness has under this name."""


@dataclass(frozen=True)
class Comparison:
    """A student against its teacher on the questions of one task, or of a group's tasks together."""

    counts: Paired
    """First the student."""
    difference: float
    """Accuracy of the student less the teacher's; of a group the mean of its tasks' differences."""
    low: float
    """Lower end of its 95% interval: Newcombe's, joined over the tasks of a group."""
    high: float
    alike: int | None
    """Questions on which both choose the same option or write the same; None without options."""

    @property
    def agreement(self) -> tuple[float, float, float] | None:
        """Share of questions answered alike with its 95% Wilson interval."""
        return None if self.alike is None else (self.alike / self.counts.n, *wilson(self.alike, self.counts.n))


def items_of(samples: Sequence[Mapping[str, Any]], metrics: Mapping[str, float], delimiter: str) -> Items | None:
    """The answers in the harness's log of a task; None where its main metric is no matter of right or wrong.

    Args:
        samples: the harness's samples of one task.
        metrics: its results, named as in `Measurement.tasks`.
        delimiter: the task's `target_delimiter`, which begins every continuation and does not count in its length.
    """
    metric = main_metric(metrics)
    if metric is None:
        return None
    name, _, filter_ = metric.partition(",")
    asked = sorted((s for s in samples if s["filter"] == (filter_ or "none")), key=lambda s: s["doc_id"])
    if not asked or any(s.get(name) not in (0, 1) for s in asked):
        return None
    chosen = [_chosen(s, name, len(delimiter)) for s in asked]
    digest = hashlib.sha256(" ".join(s["doc_hash"] + s["prompt_hash"] for s in asked).encode()).hexdigest()[:16]
    right = "".join(str(int(s[name])) for s in asked)
    return Items(metric, right, "" if None in chosen else " ".join(map(str, chosen)), digest)


def _chosen(sample: Mapping[str, Any], metric: str, delimiter: int) -> int | str | None:
    """The option that the metric takes for the model's answer, or a digest of what it wrote."""
    answers = sample["filtered_resps"]
    if isinstance(answers[0], str):
        return hashlib.sha256(answers[0].encode()).hexdigest()[:8]
    if len(answers) < 2 or not isinstance(answers[0], tuple | list):
        return None
    options = len(answers) // 2 if "acc_mutual_info" in sample["metrics"] else len(answers)
    scores = [answer[0] for answer in answers[:options]]
    if metric == "acc_norm":  # per character of the option, as in the harness
        lengths = [len(arguments[1]) - delimiter for arguments in sample["arguments"][:options]]
        scores = [score / length for score, length in zip(scores, lengths, strict=True)]
    return scores.index(max(scores))


def compare(student: Any, teacher: Any) -> dict[str, Comparison]:
    """Comparisons of two `Measurement`s by task and group, groups first; tasks that only one has are left out.

    Raises:
        UserError: when both have a task but were asked different questions.
    """
    pairs = {task: (items, teacher.items[task]) for task, items in student.items.items() if task in teacher.items}
    for task, (one, other) in pairs.items():
        if one.documents != other.documents:
            raise UserError(
                f"student and teacher were asked different questions of {task}; evaluate both with one call"
            )
    groups = {group: [task for task in tasks if task in pairs] for group, tasks in student.groups.items()}
    found = {group: _compare([pairs[task] for task in tasks]) for group, tasks in groups.items() if tasks}
    return {**found, **{task: _compare([pair]) for task, pair in pairs.items()}}


def _compare(pairs: Sequence[tuple[Items, Items]]) -> Comparison:
    flags = [(one.flags(), other.flags()) for one, other in pairs]
    counts = Paired.of((f for one, _ in flags for f in one), (f for _, other in flags for f in other))
    alike = None
    if all(one.chosen and other.chosen for one, other in pairs):
        choices = [zip(one.chosen.split(), other.chosen.split(), strict=True) for one, other in pairs]
        alike = sum(a == b for both in choices for a, b in both)
    parts = [Paired.of(one, other) for one, other in flags]
    mean = sum(part.difference for part in parts) / len(parts)
    return Comparison(counts, mean, *interval_of_mean(parts), alike)


HEADER = [
    "student and teacher",
    "questions",
    "points",
    "95%",
    "same choice",
    "95%",
    "won/lost/tied",
    "McNemar p",
]


def comparison_rows(comparisons: Mapping[str, Comparison]) -> list[list[str]]:
    """Cells under `HEADER`; shares in percent, differences in points."""
    rows = []
    for task, c in comparisons.items():
        agreement = ["–", "–"]
        if c.agreement is not None:
            share, low, high = c.agreement
            agreement = [f"{share:.1%}", f"{100 * low:.1f} to {100 * high:.1f}"]
        counts = f"{c.counts.wins}/{c.counts.losses}/{c.counts.ties}"
        interval = f"{100 * c.low:+.1f} to {100 * c.high:+.1f}"
        rows.append([task, str(c.counts.n), f"{100 * c.difference:+.1f}", interval, *agreement, counts])
        rows[-1].append("<0.001" if c.counts.p_value < 0.001 else f"{c.counts.p_value:.3f}")
    return rows
