"""The probe calibration against its formulas written out, and on predictions whose temperature is known."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from evals.probes.subjects import TEXT, run_probe, windows

from linearize.evals.config import EvalConfig
from linearize.evals.finite import nulled
from linearize.evals.measure import measure
from linearize.evals.probes.base import DoesNotFit
from linearize.evals.probes.calibration import TEMPERATURES, Calibration
from linearize.evals.views import Lines, Table

FIVE = torch.tensor([5])
PROBE = {"type": "calibration", "length": 100, "windows": 3}


class Fair(torch.nn.Module):
    """Predicts that the next token is the same with a probability of 3/4 and the next number with the rest, which is
    how often that comes true in `text`."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    text = (torch.arange(4001) // 4) % 16  # each number four times

    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.factor = factor

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        same = F.one_hot(input_ids, 16).double()
        return SimpleNamespace(logits=(0.75 * same + 0.25 * same.roll(1, -1)).clamp_min(1e-30).log() * self.factor)


def test_numbers_equal_their_formulas(converted: Callable[..., Any]) -> None:
    model = converted("gdn", "LSL").eval()
    found = run_probe(PROBE, model)
    rows = windows(100, 3)
    with torch.no_grad():
        logits = model(input_ids=rows).logits.double()[:, :-1].flatten(0, 1)
    targets = rows[:, 1:].flatten()
    losses = [float(F.cross_entropy(logits / t, targets)) for t in TEMPERATURES]
    assert [p["loss"] for p in found["curve"]] == pytest.approx(losses, rel=1e-5)
    assert [p["temperature"] for p in found["curve"]] == list(TEMPERATURES)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)
    fine = [float(F.cross_entropy(logits / 2 ** (step / 100), targets)) for step in range(-100, 151)]
    assert found["calibrated"] == pytest.approx(min(fine), rel=1e-5)
    confidence, likeliest = logits.softmax(-1).max(-1)
    error = 0.0
    for i in range(15):
        inside = (confidence >= i / 15) & (confidence < (i + 1) / 15)
        if inside.any():
            right = (likeliest == targets)[inside].double()
            error += float(inside.double().mean() * (right.mean() - confidence[inside].mean()).abs())
    assert found["error"] == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.23, 2.0])
def test_the_temperature_of_true_probabilities_is_found(factor: float) -> None:
    model = Fair(factor)
    found = run_probe(
        {"type": "calibration", "length": 401, "windows": 9}, model, text=Fair.text, teacher=None, seq_len=400
    )
    assert found["temperature"] == pytest.approx(factor, rel=5e-3)
    assert found["calibrated"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), rel=2e-3)
    share = 0.75**factor / (0.75**factor + 0.25**factor)
    assert found["error"] == pytest.approx(abs(share - 0.75), abs=2e-3)


def test_a_best_temperature_at_the_end_of_what_was_tried_is_told() -> None:
    how: dict[str, Any] = {"text": Fair.text, "teacher": None, "seq_len": 400}
    found = run_probe("calibration", Fair(8.0), **how)
    assert found["notes"] == [f"the loss is lowest at a temperature of {TEMPERATURES[-1]:.3g}, the last that was tried"]
    assert run_probe("calibration", Fair(), **how)["notes"] == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_model_has_no_result_and_stops_nothing(
    value: float, converted: Callable[..., Any], pico_tokenizer: Any
) -> None:
    model = converted("gdn", "LSL").eval()
    model.lm_head.weight.data[:] = value
    config = EvalConfig(lengths=[100], windows=3, recall=False, branches=False, divergence=False, probes=[PROBE])
    found = measure(model, pico_tokenizer, config, token_ids=TEXT, seq_len=50, has_teacher=False)
    assert [entry["result"] for entry in found.probes] == [None]
    assert any("NaN or infinite" in note for note in found.notes)


def test_tokens_that_are_never_predicted_leave_no_temperature() -> None:
    """A loss that is infinite at every temperature has no lowest one."""

    class WithoutFive(Fair):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=super().forward(input_ids, use_cache).logits.index_fill(-1, FIVE, -math.inf))

    found = run_probe("calibration", WithoutFive(), text=Fair.text, teacher=None, seq_len=400)
    assert math.isnan(found["temperature"]) and math.isinf(found["loss"]) and found["notes"] == []
    shown = Calibration.views({"model": nulled(found)})[-1]
    assert isinstance(shown, Lines) and shown.series == {"model": []}


def test_the_table_says_on_how_much_text() -> None:
    how: dict[str, Any] = {"text": Fair.text, "teacher": None, "seq_len": 400}
    one, other = run_probe("calibration", Fair(), **how), run_probe(PROBE, Fair(), **how)
    (table,) = Calibration.summary({"a": one, "b": one})
    assert isinstance(table, Table) and table.note.startswith("On 10 x 400 tokens of text. ")
    assert "As a teacher" not in table.note
    root = math.sqrt(one["temperature"])
    (alone,) = Calibration.summary({"model": one})
    assert isinstance(alone, Table)
    assert alone.note.endswith(f": teacher_temperature {root:.3g}, its root, to {one['temperature']:.3g}.")
    for none in (None, math.nan):
        (alone,) = Calibration.summary({"model": {**one, "temperature": none}})
        assert isinstance(alone, Table) and "As a teacher" not in alone.note
    assert Calibration.views({"a": one, "b": other})[0].note.startswith(
        "On 10 x 400 tokens (a), 3 x 100 tokens (b) of text."
    )


def test_windows_without_a_token_to_predict_are_told() -> None:
    with pytest.raises(DoesNotFit, match="its windows have 1; give a longer text or length, or leave the probe out"):
        run_probe("calibration", Fair(), text=Fair.text[:1], teacher=None)
