"""The probe length_extrapolation against cross entropies written out, and models whose fault is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from evals.probes.subjects import TEXT, run_probe, windows

from linearize.errors import UserError
from linearize.evals.config import EvalConfig
from linearize.evals.measure import measure
from linearize.evals.probes.length_extrapolation import LengthExtrapolation
from linearize.evals.text import evaluating, position_losses

PROBE = {"type": "length_extrapolation", "windows": 2}


@pytest.mark.parametrize(("short", "times"), [(6, 4), (7, 3)])
def test_equals_cross_entropy_of_the_same_tokens(short: int, times: int, converted: Callable[..., Any]) -> None:
    model = converted("gdn", "LSL")
    found = run_probe({**PROBE, "times": times}, model, seq_len=short)
    ids, step = windows(short * times, 2), short - short // 2
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()
        full = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        near = {}
        for p in range(short, short * times):
            start = step * ((p - short) // step + 1)  # of the first window in whose second half the token lies
            assert short // 2 <= p - start < short
            after = model(input_ids=ids[:, start:p]).logits[:, -1].double()
            near[p] = F.cross_entropy(after, ids[:, p], reduction="none")
    assert [(b["first"], b["end"]) for b in found["buckets"]] == [
        (1, short),
        *((n * short, (n + 1) * short) for n in range(1, times)),
    ]
    assert found["buckets"][0]["rise"] is None
    for b in found["buckets"]:
        loss = full[:, b["first"] - 1 : b["end"] - 1].mean(1)
        assert b["loss"] == pytest.approx(float(loss.mean()), rel=1e-5)
        if b["first"] >= short:
            few = torch.stack([near[p] for p in range(b["first"], b["end"])], dim=1).mean(1)
            assert b["short"] == pytest.approx(float(few.mean()), rel=1e-5)
            assert b["rise"] == pytest.approx(float((loss - few).mean()), abs=1e-5)
            assert b["error"] == pytest.approx(float((loss - few).std()) / 2**0.5, abs=1e-5)


def test_a_model_that_fails_beyond_its_length_is_named(pico_model: Callable[..., Any]) -> None:
    """Predictions that do not depend on the context, but are three times as sure of themselves from position 64 on."""
    model = pico_model()
    guess = torch.randn(97, generator=torch.Generator().manual_seed(0))
    factor = torch.where(torch.arange(128) >= 64, 3.0, 1.0)[:, None]
    hook = model.lm_head.register_forward_hook(
        lambda module, args, logits: guess * factor[: logits.shape[1]] + 0 * logits
    )
    found = run_probe({**PROBE, "times": 4}, model)
    strict = run_probe({**PROBE, "times": 4, "threshold": 50.0}, model)
    hook.remove()
    rises = [b["rise"] for b in found["buckets"]]
    assert rises[1] == pytest.approx(0, abs=1e-6) and min(rises[2:]) > 0.5
    (note,) = found["notes"]
    assert note.startswith(f"collapse: from position 64 on the loss is {rises[2]:.2f} nats above")
    assert f"{max(rises[2:]):.2f} at worst" in note and "training length 32" in note
    assert not strict["notes"]


def test_hard_text_is_not_taken_for_a_collapse(pico_model: Callable[..., Any]) -> None:
    """A model that always expects token 5, on text that is nothing else at first."""
    model = pico_model()
    one = torch.zeros(97)
    one[5] = 4.0
    hook = model.lm_head.register_forward_hook(lambda module, args, logits: one.expand_as(logits))
    text = torch.cat([torch.full((32,), 5), TEXT[:96]])
    found = run_probe({**PROBE, "times": 4, "windows": 1}, model, text=text)
    hook.remove()
    assert found["buckets"][1]["loss"] > found["buckets"][0]["loss"] + 1
    assert found["buckets"][1]["rise"] == pytest.approx(0, abs=1e-6) and found["buckets"][1]["error"] is None
    assert not found["notes"]


def test_a_loss_that_is_not_finite_is_none_and_named(pico_model: Callable[..., Any]) -> None:
    model = pico_model()
    far = torch.where(torch.arange(128) >= 70, torch.nan, 0.0)[:, None]
    hook = model.lm_head.register_forward_hook(lambda module, args, logits: logits + far[: logits.shape[1]])
    found = run_probe({**PROBE, "times": 4}, model)
    hook.remove()
    assert [b["loss"] is None for b in found["buckets"]] == [False, False, True, True]
    assert "the loss is not finite from position 64 on" in found["notes"]


def test_what_limits_the_length_is_said(pico_model: Callable[..., Any], converted: Callable[..., Any]) -> None:
    short_text = run_probe(PROBE, pico_model(), text=TEXT[:100])
    assert short_text["length"] == 100 and "the text has 100" in short_text["notes"][0]
    beyond = run_probe({**PROBE, "windows": 1}, pico_model(max_position_embeddings=64))
    assert beyond["length"] == 256 and "positions from 64 on are beyond" in beyond["notes"][0]
    ends = run_probe({**PROBE, "windows": 1}, converted("gdn", "LSL", family="gpt2", max_position_embeddings=64))
    assert ends["length"] == 64 and "lengths end at 64 tokens" in ends["notes"][0]
    with pytest.raises(UserError, match="length_extrapolation .* the longest window 1; give a longer text"):
        run_probe(PROBE, pico_model(), text=TEXT[:1])


@pytest.mark.parametrize("limit", ["positions", "text"])
def test_nothing_beyond_the_training_length_is_a_result_and_says_why(
    limit: str, pico_model: Callable[..., Any], converted: Callable[..., Any], pico_tokenizer: Any
) -> None:
    model = (
        converted("gdn", "LSL", family="gpt2", max_position_embeddings=100) if limit == "positions" else pico_model()
    )
    text, seq_len = (TEXT, 100) if limit == "positions" else (TEXT[:90], 100)
    config = EvalConfig(lengths=[32], windows=2, recall=False, branches=False, probes=[PROBE])
    found = measure(model, pico_tokenizer, config, token_ids=text, seq_len=seq_len)
    (result,) = [probe["result"] for probe in found.probes]
    longest = min(len(text), 100)
    assert [(b["first"], b["end"]) for b in result["buckets"]] == [(1, 64), (64, longest)]
    with evaluating(model):
        losses = position_losses(model, windows(longest, result["windows"], text)).mean(0)
    last = result["buckets"][-1]
    assert last["loss"] == pytest.approx(float(losses[63:].mean()), rel=1e-5) and last["rise"] is None
    why = "the model has no further positions" if limit == "positions" else "the text has 90"
    assert why in result["ended"] and any(why in note for note in found.notes)
    assert any("nothing beyond the training length of 100 tokens" in note for note in found.notes)
    again = json.loads(json.dumps(result))
    (view,) = LengthExtrapolation.views({"student": again})
    assert "Training length: 100 tokens." in view.note and f"student: {result['ended']}." in view.note
    longer = run_probe({**PROBE, "times": 2}, pico_model())
    assert longer["ended"] is None
    assert [len(v.series) for v in LengthExtrapolation.views({"student": again, "teacher": longer})] == [2, 1]
