"""What holds for every probe: plain results, views of them, an untouched model, no trace of batches."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from linearize.errors import UserError
from linearize.evals.config import EvalConfig
from linearize.evals.evaluate import evaluate
from linearize.evals.measure import measure
from linearize.evals.probe_views import probe_views
from linearize.evals.probes.base import Probe, probe_of
from linearize.evals.views import Bars, HeatMap, Lines, Table
from linearize.preflight import check_sources
from linearize.recipe import Recipe
from linearize.registry import find, keys
from linearize.swap import teacher_path

TEXT = torch.randint(3, 97, (4096,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def student(converted: Callable[..., Any]) -> Any:
    return converted("gdn", "LSL")


SMALL = {"windows": 5, "prompts": 5, "tokens": 12, "lengths": [512], "items": 5, "depths": [0.5]}
"""Settings by which probes are quick, where they have them; five rows are a batch of four and a rest."""


def run(key: str, model: Any, tokenizer: Any, **options: Any) -> list[dict[str, Any]]:
    known = find("evals.probes", key, Probe).Config.model_fields
    probe = {"type": key, **{name: value for name, value in SMALL.items() if name in known}}
    config = EvalConfig(lengths=[32], windows=2, recall=False, branches=False, probes=[probe], **options)
    return measure(model, tokenizer, config, token_ids=TEXT, seq_len=32, has_teacher=True).probes


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("key", keys("evals.probes"))
def test_a_probe_gives_plain_data_and_views_of_it(key: str, student: Any, pico_tokenizer: Any) -> None:
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    (found,) = run(key, student, pico_tokenizer)
    assert found["probe"]["type"] == key
    assert numbers(found["result"]), "nothing was measured"
    again = json.loads(json.dumps(found["result"], allow_nan=False))
    assert all(math.isfinite(n) for n in numbers(again))
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    views = find("evals.probes", key, Probe).views({"one": again, "other": again})
    assert views
    for view in views:
        assert isinstance(view, Table | Lines | Bars | HeatMap) and view.title
        json.dumps(asdict(view), allow_nan=False)
        if isinstance(view, Table):
            assert all(len(row) == len(view.columns) for row in view.rows)
        if isinstance(view, Bars):
            assert all(len(heights) == len(view.labels) for heights in view.series.values())
        if isinstance(view, HeatMap):
            assert len(view.values) == len(view.y) and all(len(row) == len(view.x) for row in view.values)
        if isinstance(view, Lines):
            assert all(list(points) == sorted(points) for points in view.series.values())


@pytest.mark.parametrize("key", keys("evals.probes"))
def test_a_probe_does_not_depend_on_the_batch_and_repeats(key: str, student: Any, pico_tokenizer: Any) -> None:
    one, four = (numbers(run(key, student, pico_tokenizer, batch_size=size)) for size in (1, 4))
    assert len(one) == len(four) and one == pytest.approx(four, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("key", keys("evals.probes"))
def test_a_probe_that_does_not_fit_is_left_out(key: str, student: Any, pico_tokenizer: Any) -> None:
    with teacher_path(student):
        found = run(key, student, pico_tokenizer)
    probe = probe_of(key)
    assert len(found) == (0 if probe.needs_teacher or probe.needs_mixers else 1)


@pytest.mark.parametrize(
    ("probe", "note"),
    [
        (
            {"type": "generation_agreement", "tokens": 5000},
            "not measured: generation_agreement needs .* lower",
        ),
        ({"type": "option_permutation"}, r"not measured: a question of option_permutation takes \d+ tokens and .* 512"),
        ({"type": "length_extrapolation"}, "not measured: length_extrapolation predicts .* or leave the probe out"),
    ],
)
def test_settings_that_do_not_fit_stop_nothing_else(
    probe: dict[str, Any], note: str, student: Any, pico_tokenizer: Any, tmp_path: Any
) -> None:
    if probe["type"] == "option_permutation":
        (tmp_path / "long.jsonl").write_text(json.dumps({"query": "q" * 600, "choices": ["a", "b"], "gold": 0}))
        probe = {**probe, "questions": str(tmp_path / "long.jsonl")}
    config = EvalConfig(lengths=[32], windows=2, recall=False, branches=False, probes=[probe, "state_norms"])
    how: dict[str, Any] = {"token_ids": TEXT, "has_teacher": True}
    found = measure(student, pico_tokenizer, config, seq_len=1 if "length" in probe["type"] else 32, **how)
    assert [each["result"] is None for each in found.probes] == [True, False] and found.losses
    (told,) = [each for each in found.notes if "not measured" in each]
    assert re.fullmatch(f"{note}.*", told)
    assert probe_views({"student": found}, trusted=False)[1] == [], "the note says it, and the page no more"


def test_questions_in_a_file_are_read_before_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.evals.evaluate.load", lambda *args, **options: pytest.fail("weights were loaded"))
    probe = {"type": "option_permutation", "questions": "none.jsonl"}
    with pytest.raises(UserError, match=r"option_permutation.questions='none.jsonl' does not exist"):
        evaluate("demo", device="cpu", probes=[probe])
    with pytest.raises(UserError, match=r"option_permutation.questions='none.jsonl' does not exist"):
        check_sources(Recipe.load("auto", model="demo", overrides=[f"evaluation.probes={json.dumps([probe])}"]))


@pytest.mark.parametrize(
    ("probes", "message"),
    [
        (["kl_by_positon"], "unknown probe 'kl_by_positon'; did you mean 'kl_by_position'"),
        (
            ["recal"],
            r"did you mean 'recall'\? known: .*, recall, .*; long and recall are groups of them;",
        ),
        ([{"type": "kl_by_position", "lenght": 3}], "probes.0.lenght"),
        ([{"length": 3}], "probes.0 must be names of probes"),
        ("kl_by_position", "must be a list of probes"),
    ],
)
def test_a_wrong_probe_is_named(probes: Any, message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message.replace("(", r"\(")):
        EvalConfig(probes=probes)
