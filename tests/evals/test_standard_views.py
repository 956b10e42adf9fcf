"""The views of standing measurements: what was measured, for each model, and nothing that was not."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from linearize.evals.agreement import Agreement
from linearize.evals.divergence import Divergence
from linearize.evals.measure import Measurement
from linearize.evals.recall_score import RecallScore
from linearize.evals.standard_views import standard_views
from linearize.evals.text import BranchLoss, TextLoss
from linearize.evals.views import Bars, Lines, Table


def loss(length: int, value: float) -> TextLoss:
    return TextLoss(length, value, 100, 2, ((1, 64, value + 1), (64, length, value)))


TEACHER = Measurement(
    losses=[loss(128, 3.0), loss(256, 2.5)],
    recall=[RecallScore(1, 200, 0.75, 16, 0.5, 0.9), RecallScore(4, 900, None, 0, skipped="too long")],
    tasks={"piqa": {"acc": 0.6, "acc_stderr": 0.01}},
)
STUDENT = Measurement(
    losses=[loss(128, 3.25)],
    branches=[BranchLoss("linear", 128, 3.5), BranchLoss("window", 128, 5.25)],
    divergence=[Divergence(128, 0.125, 0.875)],
    recall=[RecallScore(1, 200, 0.25, 16, 0.1, 0.5)],
)


def test_each_view_shows_its_numbers() -> None:
    views = {view.title: view for view in standard_views({"teacher": TEACHER, "student": STUDENT})}
    by_length = views["Loss by context length"]
    assert isinstance(by_length, Bars) and by_length.labels == ["128 tokens", "256 tokens"]
    assert by_length.series == {"teacher": [3.0, 2.5], "student": [3.25, None]}
    by_position = views["Loss by position in 256 tokens"]
    assert isinstance(by_position, Lines) and by_position.series == {"teacher": [(64, 3.5), (256, 2.5)]}
    for branch, rise in (("linear", 0.25), ("window", 2.0)):
        bars = views[f"What the {branch} branch is worth"]
        assert isinstance(bars, Bars) and bars.series == {"student": [rise]} and bars.labels == ["128 tokens"]
    kl, same = views["KL to the teacher"], views["Same likeliest token as the teacher"]
    assert isinstance(kl, Bars) and kl.series == {"student": [0.125]}
    assert isinstance(same, Bars) and same.series == {"student": [0.875]}
    recall, intervals = views["Recall"], views["Recall with 95% intervals"]
    assert isinstance(recall, Bars) and recall.series == {"teacher": [75], "student": [25]}
    assert isinstance(intervals, Table)
    assert intervals.rows == [
        ["teacher", "1 fact/200", "75%", "50%", "90%", "16"],
        ["student", "1 fact/200", "25%", "10%", "50%", "16"],
    ]
    assert len(views) == 8


def test_an_encoder_and_nothing_at_all() -> None:
    (view,) = standard_views({"encoder": Measurement(agreement=[Agreement(64, 0.9, 0.8, 2)]), "none": Measurement()})
    assert isinstance(view, Bars) and view.series == {"encoder": [0.9, 0.8]}
    assert standard_views({"none": Measurement()}) == [] and standard_views({}) == []


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_numbers_of_a_broken_model_are_left_out(broken: float) -> None:
    measurement = Measurement(
        losses=[loss(128, broken)],
        branches=[BranchLoss("linear", 128, broken)],
        divergence=[Divergence(128, broken, 0.5)],
    )
    for view in standard_views({"broken": measurement, "student": STUDENT}):
        json.dumps(asdict(view), allow_nan=False)
