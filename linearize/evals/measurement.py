"""What was measured on one model at one point: plain data that goes to JSON and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from linearize.evals.agreement import Agreement
from linearize.evals.divergence import Divergence
from linearize.evals.finite import nulled
from linearize.evals.items import Asked, Items
from linearize.evals.recall_score import RecallScore
from linearize.evals.task_groups import main_metric
from linearize.evals.text import BranchLoss, TextLoss


@dataclass
class Measurement:
    """Everything measured on one model at one point."""

    losses: list[TextLoss] = field(default_factory=list)
    branches: list[BranchLoss] = field(default_factory=list)
    recall: list[RecallScore] = field(default_factory=list)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    """{task or group: {metric: value}} from the lm-evaluation-harness."""
    groups: dict[str, list[str]] = field(default_factory=dict)
    """The tasks of each group among them."""
    items: dict[str, Items] = field(default_factory=dict)
    """The answers to each question of tasks that are right or wrong, to compare models question by question."""
    asked: dict[str, Asked] = field(default_factory=dict)
    """How each task and group was asked; empty in measurements that are older than this."""
    prompt: str | None = None
    sample: str | None = None
    """What the model wrote after `prompt`, greedily."""
    divergence: list[Divergence] = field(default_factory=list)
    """From the teacher's predictions."""
    probes: list[dict[str, Any]] = field(default_factory=list)
    """`{"probe": settings, "result": plain data}` of each further measurement that was asked for and fits the model."""
    agreement: list[Agreement] = field(default_factory=list)
    """Of an encoder with its softmax teacher."""
    tokens: int = 0
    """Training tokens used up to this point."""
    seconds: float = 0.0
    """Wall-clock seconds of training up to this point."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know to read the numbers right."""

    def loss(self, length: int) -> float | None:
        """Nats per token at `length`, None if not measured."""
        return next((point.loss for point in self.losses if point.length == length), None)

    def position_loss(self, length: int, first: int, end: int) -> float | None:
        """Nats per token at positions first <= p < end of windows of `length`, None if not measured."""
        buckets = (bucket for point in self.losses if point.length == length for bucket in point.by_position)
        return next((loss for a, b, loss in buckets if (a, b) == (first, end)), None)

    def branch_loss(self, branch: str, length: int) -> float | None:
        """Nats per token with `branch` off, None if not measured."""
        return next((b.loss for b in self.branches if (b.branch, b.length) == (branch, length)), None)

    def recall_rate(self, facts: int, distance: int) -> float | None:
        """Share of right answers, None if not measured."""
        return next((r.exact_match for r in self.recall if (r.facts, r.distance) == (facts, distance)), None)

    def diverges(self, length: int) -> Divergence | None:
        """Divergence from the teacher at `length`, None if not measured."""
        return next((found for found in self.divergence if found.length == length), None)

    def agrees(self, length: int) -> Agreement | None:
        """Agreement with the teacher at `length`, None if not measured."""
        return next((found for found in self.agreement if found.length == length), None)

    def main_metrics(self, task: str) -> list[str]:
        """The metric of `task` that tables show; all of them if it has none of the usual ones."""
        main = main_metric(self.tasks[task])
        if main is not None and "," not in main:
            return [main]
        return [name for name in self.tasks[task] if "_stderr" not in name]

    def add(self, part: Measurement) -> None:
        """Take over everything that another measurement of the same model holds."""
        for name, value in vars(part).items():
            if isinstance(value, list):
                getattr(self, name).extend(value)
            elif isinstance(value, dict):
                getattr(self, name).update(value)
            elif value is not None and name not in ("tokens", "seconds"):
                setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite, which JSON does not have, are None."""
        return nulled(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measurement:
        """The inverse of `to_dict`, also after a trip through JSON."""
        losses = [
            TextLoss(
                **_numbers({**point, "by_position": tuple((a, b, _number(x)) for a, b, x in point["by_position"])})
            )
            for point in values["losses"]
        ]
        branches = [BranchLoss(**_numbers(loss)) for loss in values["branches"]]
        scores = [RecallScore(**score) for score in values["recall"]]
        agree = [Agreement(**_numbers(found)) for found in values.get("agreement", [])]
        diverge = [Divergence(**_numbers(found)) for found in values.get("divergence", [])]
        lists: dict[str, Any] = {
            "losses": losses,
            "branches": branches,
            "recall": scores,
            "agreement": agree,
            "divergence": diverge,
        }
        items = {task: Items(**answers) for task, answers in values.get("items", {}).items()}
        tasks = {task: _numbers(metrics) for task, metrics in values.get("tasks", {}).items()}
        asked = {task: Asked(**how) for task, how in values.get("asked", {}).items()}
        return cls(**{**values, **lists, "items": items, "asked": asked, "tasks": tasks})


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of what has a number in each, with those that JSON could not hold."""
    return {key: _number(value) for key, value in values.items()}
