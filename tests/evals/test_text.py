"""Loss on text: the number itself, which windows are taken, branches, and independence of the batch size."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from linearize.errors import UserError
from linearize.evals import text
from linearize.evals.text import branch_losses, loss_on_text, spread_windows
from linearize.mixers.base import branch_off
from linearize.swap import teacher_path


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(97, (1000,), generator=torch.Generator().manual_seed(0))


def formula(model, ids, length, starts):
    """Mean of -log p(x_t | x_<t) over all windows, and the same per position, by the definition."""
    rows = torch.stack([ids[s : s + length] for s in starts])
    with torch.no_grad():
        p = model(input_ids=rows).logits.double().softmax(-1)
    losses = torch.stack([-p[r, t - 1, rows[r, t]].log() for r in range(len(rows)) for t in range(1, length)])
    return losses.mean().item(), losses.view(len(rows), length - 1).mean(0)


def test_loss_is_the_mean_negative_log_probability(pico_model, ids):
    model = pico_model()
    score = loss_on_text(model, ids, length=100, batch_size=3)
    loss, by_position = formula(model, ids, 100, range(0, 1000, 100))
    assert score.loss == pytest.approx(loss, abs=1e-5)
    assert (score.tokens, score.windows, score.length) == (990, 10, 100)
    assert [bucket[:2] for bucket in score.by_position] == [(1, 64), (64, 100)]
    assert score.by_position[1][2] == pytest.approx(by_position[63:].mean().item(), abs=1e-5)


def test_batch_size_and_logit_slices_do_not_change_the_loss(converted, ids, monkeypatch):
    model = converted("lolcats")
    one = loss_on_text(model, ids, length=100, batch_size=1)
    monkeypatch.setattr(text, "LOGIT_BUDGET", 97 * 4 * 7)
    four = loss_on_text(model, ids, length=100, batch_size=4)
    assert one.loss == pytest.approx(four.loss, abs=1e-5)


def test_windows_are_spread_evenly_and_never_overlap():
    assert spread_windows(1000, 100, None) == list(range(0, 1000, 100))
    assert spread_windows(1000, 100, 3) == [0, 300, 600]
    assert spread_windows(1000, 100, 99) == list(range(0, 1000, 100))
    starts = spread_windows(1_234_567, 2048, 37)
    assert len(starts) == 37 and min(b - a for a, b in pairwise(starts)) >= 2048


def test_short_text_is_an_error_that_says_what_to_do():
    with pytest.raises(UserError, match="50 tokens, fewer than one window of 100; choose shorter `lengths`"):
        spread_windows(50, 100, None)


def test_branch_losses_are_those_inside_branch_off(converted, ids):
    model = converted("lolcats")
    losses = branch_losses(model, ids, lengths=[50, 100], windows=4)
    assert [(loss.branch, loss.length) for loss in losses] == [
        ("linear", 50),
        ("linear", 100),
        ("window", 50),
        ("window", 100),
    ]
    with branch_off(model, "window"):
        assert losses[3].loss == loss_on_text(model, ids, length=100, windows=4).loss
    whole = loss_on_text(model, ids, length=100, windows=4).loss
    assert all(abs(loss.loss - whole) > 1e-4 for loss in losses[1::2])


def test_no_branches_where_no_mixer_runs(converted, pico_model, ids):
    model = converted("lolcats")
    with teacher_path(model):
        assert branch_losses(model, ids, lengths=[50]) == []
        as_teacher = loss_on_text(model, ids, length=50).loss
    assert branch_losses(pico_model(), ids, lengths=[50]) == []
    assert as_teacher == loss_on_text(pico_model(), ids, length=50).loss


def test_training_mode_comes_back(pico_model, ids):
    model = pico_model().train()
    loss_on_text(model, ids, length=50, windows=1)
    assert model.training
