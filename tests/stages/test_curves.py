"""Every stage that trains brings its loss down on the demo teacher, and along the curve that was written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from curves import CASES, FILE, STEPS, Bench

from linearize.bench_training import time_stages
from linearize.registry import find, keys
from linearize.stages.base import Stage

GOLDEN = json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(Path(tmp_path_factory.mktemp("curves")))


def test_every_stage_that_trains_has_a_curve() -> None:
    training = {key for key in keys("stages") if find("stages", key, Stage).trains}
    assert training == {case.stage["type"] for case in CASES.values()}, (
        "give the stage a case in tests/stages/curves.py"
    )
    assert list(GOLDEN) == list(CASES), "run `make golden`"


@pytest.mark.parametrize("name", CASES)
def test_curve(bench: Bench, name: str) -> None:
    losses, case = bench.curve(CASES[name]), CASES[name]
    last = losses[-STEPS // 4 :]
    assert len(losses) == STEPS and sum(last) / len(last) < case.factor * losses[0]
    assert losses == pytest.approx(GOLDEN[name], rel=5e-3, abs=1e-3), "if the change is meant, run `make golden`"


@pytest.mark.parametrize("name", {case.stage["type"]: name for name, case in CASES.items()}.values())
def test_a_benchmark_times_its_step(bench: Bench, name: str) -> None:
    stage = bench.stage(CASES[name])
    (speed,) = time_stages(bench.student(CASES[name].mixer), [stage], batch=2, length=32, repeats=1)
    assert speed.batch == 2 * stage.item_rows and speed.student and speed.student > 0
    assert (speed.teacher is not None) == stage.end_to_end
