"""The probe transfer_error against softmax and mixer run by hand on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from evals.probes.subjects import run_probe, small, windows

from linearize import registry
from linearize.errors import UserError
from linearize.swap import source_weights, swapped, teacher_path

PROBE = {"type": "transfer_error", "windows": 2}


def by_hand(model: Any, ids: torch.Tensor) -> list[tuple[float, float, float]]:
    """(error, cosine, size) of each swapped layer: the module called twice on what the softmax teacher gave it."""
    given: dict[str, tuple[dict[str, Any], torch.Tensor]] = {}
    layers = swapped(model)
    hooks = [
        attn.register_forward_hook(
            lambda m, a, kw, out, name=name: given.update({name: (kw, out[0])}), with_kwargs=True
        )
        for name, attn in layers.items()
    ]
    with torch.no_grad(), teacher_path(model):
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    found = []
    for name, attn in layers.items():
        kwargs, teacher = given[name]
        with torch.no_grad():
            student = attn(**kwargs)[0]
        s, t = student.double().flatten(0, 1), teacher.double().flatten(0, 1)
        cosines = (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
        found.append((float((s - t).norm() / t.norm()), float(cosines.mean()), float(s.norm() / t.norm())))
    return found


@pytest.mark.parametrize("key", registry.keys("mixers"))
def test_equals_mixer_and_softmax_run_by_hand(key: str, converted: Callable[..., Any]) -> None:
    model = converted(key, "LSL", settings=small(key))
    found = run_probe(PROBE, model)
    assert [at["layer"] for at in found["layers"]] == [0, 2] and found["tokens"] == 64
    for at, expected in zip(found["layers"], by_hand(model, windows(32, 2)), strict=True):
        assert (at["error"], at["cosine"], at["size"]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert at["error"] > 1e-3, "untrained mixers are not softmax attention"


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "phi3"])
def test_families_that_pass_arguments_in_other_ways(family: str, converted: Callable[..., Any]) -> None:
    model = converted("gdn", "LSL", family=family)
    found = run_probe(PROBE, model)
    assert [at["layer"] for at in found["layers"]] == [0, 2]
    assert all(0 < at["error"] < 100 for at in found["layers"])


def test_a_window_that_sees_everything_is_softmax_attention(converted: Callable[..., Any]) -> None:
    found = run_probe(PROBE, converted("lolcats", "LSL", settings={"window": 32}))
    assert all(at["error"] < 1e-5 and at["cosine"] == pytest.approx(1) for at in found["layers"])


def test_a_trained_student_is_compared_with_its_source(
    converted: Callable[..., Any], pico_model: Callable[..., Any]
) -> None:
    """The teacher is the source as it was, in the model's own memory of it as in another model."""
    model = converted("gdn", "LSL")
    before = run_probe(PROBE, model)
    projection = next(iter(swapped(model).values())).o_proj.weight
    source_weights(model).keep([projection])
    projection.data *= 1.5
    inside = run_probe(PROBE, model)
    outside = run_probe(PROBE, model, teacher=lambda: nullcontext(pico_model(0)))
    assert inside["layers"][0]["error"] != pytest.approx(before["layers"][0]["error"], rel=1e-3)
    for a, b in zip(inside["layers"], outside["layers"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_teacher_in_another_data_type(converted: Callable[..., Any], pico_model: Callable[..., Any]) -> None:
    """Checkpoints keep the type they were trained in, which for a student is often another than its source's."""
    model = converted("gdn", "LSL")
    half = run_probe(PROBE, model, teacher=lambda: nullcontext(pico_model(0).bfloat16()))
    for a, b in zip(half["layers"], run_probe(PROBE, model)["layers"], strict=True):
        assert a["error"] == pytest.approx(b["error"], rel=0.05)


def test_a_teacher_of_another_shape_is_refused(converted: Callable[..., Any], pico_model: Callable[..., Any]) -> None:
    other = pico_model(0, num_hidden_layers=2)
    with pytest.raises(UserError, match="transfer_error.*give the model it was converted from"):
        run_probe(PROBE, converted("gdn", "LSL"), teacher=lambda: nullcontext(other))
