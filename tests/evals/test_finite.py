"""Models whose predictions are NaN or infinite: everything is measured, nothing is made up, and JSON stays JSON."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from evals.harness_cases import write_questions

from linearize.evals.config import EvalConfig
from linearize.evals.finite import BROKEN, nulled, places, watching
from linearize.evals.local_tasks import local_tasks
from linearize.evals.measure import measure
from linearize.evals.measurement import Measurement
from linearize.evals.probe_views import as_text, probe_views
from linearize.evals.report import Report
from linearize.evals.standard_views import standard_views
from linearize.evals.table import side_by_side
from linearize.registry import keys

TEXT = torch.randint(3, 97, (3000,), generator=torch.Generator().manual_seed(0))
SMALL = {"windows": 1, "lengths": [700], "items": 1, "depths": [0.5], "prompts": 2, "tokens": 4}


def config(**changes: Any) -> EvalConfig:
    from linearize.evals.probes.base import Probe
    from linearize.registry import find

    probes = []
    for key in keys("evals.probes"):
        known = find("evals.probes", key, Probe).Config.model_fields
        probes.append({"type": key, **{name: value for name, value in SMALL.items() if name in known}})
    values = {"lengths": [32], "windows": 2, "recall": [[1, 30]], "recall_items": 2, "probes": probes}
    return EvalConfig.model_validate({**values, "sample_prompt": "abc", **changes})


@pytest.fixture
def student(converted: Any) -> Any:
    return converted("lolcats", "LSL", max_position_embeddings=1024)


def broken_as(student: Any, how: str) -> Any:
    """The model with a weight that is no number: before the mixers, in the head, or as an overflow."""
    name, value = {
        "NaN in a layer": ("model.layers.0.self_attn.q_proj.weight", math.nan),
        "NaN in the head": ("lm_head.weight", math.nan),
        "infinity": ("lm_head.weight", math.inf),
    }[how]
    student.get_parameter(name).data[3] = value
    return student


@pytest.mark.parametrize("how", ["NaN in a layer", "NaN in the head", "infinity"])
def test_every_measurement_says_that_it_has_no_number(
    how: str, student: Any, pico_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    model = broken_as(student, how)
    with local_tasks(write_questions(tmp_path / "questions")) as (paths, names), caplog.at_level(logging.WARNING):
        settings = config(tasks=names)
        options = {"token_ids": TEXT, "seq_len": 32, "has_teacher": True, "include_path": paths}
        found = measure(model, pico_tokenizer, settings, **options)
    (point,) = found.losses
    assert not math.isfinite(point.loss)
    (question,) = found.recall
    assert question.exact_match is None and question.n == 2
    assert all(math.isnan(value) for metrics in found.tasks.values() for value in metrics.values()) and not found.items
    assert found.sample is None
    told = [note for note in found.notes if BROKEN in note]
    for what in (
        "losses: ",
        "divergence from the teacher: ",
        "branches: ",
        "recall of 1 fact(s)",
        "tasks: ",
        "the prompt",
    ):
        assert any(note.startswith(what) for note in told), what
    told += [note for note in found.notes if "not finite" in note]
    in_the_layers = {"gates", "state_norms", "transfer_error"} if how != "NaN in a layer" else set()
    for probe in found.probes:
        key = probe["probe"]["type"]
        assert key in in_the_layers - {"gates"} or any(note.startswith(key) for note in told), key
    assert {record.getMessage() for record in caplog.records} >= {note for note in found.notes if BROKEN in note}

    written = json.dumps(found.to_dict(), allow_nan=False)
    assert Measurement.from_dict(json.loads(written)).to_dict() == found.to_dict()
    report = Report("x", found, "y", found, {}, {})
    report.to_json(tmp_path / "report.json")
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    again = Report.from_json(tmp_path / "report.json")
    assert "nan" not in again.table().lower().replace("nan or", "").split("note")[0]
    for brief in (True, False):
        views, missing = probe_views({"one": again.student, "two": found}, trusted=False, brief=brief)
        assert views and not missing and all(map(as_text, views))
    assert standard_views({"one": again.student}) is not None and side_by_side(again.student, found)


def test_a_whole_model_is_not_suspected(student: Any, pico_tokenizer: Any) -> None:
    found = measure(student, pico_tokenizer, config(), token_ids=TEXT, seq_len=32, has_teacher=True)
    assert not [note for note in found.notes if BROKEN in note or "finite" in note]
    assert all(probe["result"] for probe in found.probes) and found.sample and places(found.to_dict())[0] == 0


def test_logits_of_tokens_that_are_never_written_do_not_count(pico_model: Any) -> None:
    model = pico_model()
    model.lm_head.register_forward_hook(
        lambda module, args, out: torch.cat([out[..., :90], torch.full_like(out[..., 90:], -math.inf)], dim=-1)
    )
    with watching(model, None) as broken:
        model(input_ids=TEXT[None, :8])
        assert not broken()
    assert not model._forward_hooks


def test_one_bad_token_is_noticed_in_generation_and_adapters(pico_model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(pico_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with watching(model) as broken:
        model.generate(input_ids=TEXT[None, :8], attention_mask=torch.ones(1, 8), max_new_tokens=2, do_sample=False)
        assert not broken()
        model.get_base_model().lm_head.weight.data[5, 5] = math.nan
        model(input_ids=TEXT[None, :8])
        assert broken()
    with watching(model) as broken:
        model.generate(input_ids=TEXT[None, :8], attention_mask=torch.ones(1, 8), max_new_tokens=2, do_sample=False)
        assert broken()


def test_numbers_that_json_does_not_have_become_null() -> None:
    data = {"a": [1.0, math.nan, (2, -math.inf)], "b": "nan", "c": None, "d": 3}
    assert nulled(data) == {"a": [1.0, None, (2, None)], "b": "nan", "c": None, "d": 3}
    assert places(data) == (2, 3)
