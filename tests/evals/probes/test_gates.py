"""The probe gates against the formulas of gates whose values are known, for every mixer and way to combine branches."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from evals.probes.subjects import run_probe, small, windows

from linearize import registry
from linearize.evals.probes.gates import Gates
from linearize.mixers.base import HeadShape, branch_off
from linearize.mixers.parts.base import build
from linearize.mixers.parts.combines.base import Combine, Memory, Window
from linearize.mixers.parts.decays.base import Decay
from linearize.swap import swapped

PROBE = {"type": "gates", "windows": 2}
SHAPE = HeadShape(heads=4, kv_heads=2, key_dim=8, value_dim=8, hidden_size=32, scale=8**-0.5)


@pytest.mark.parametrize("key", registry.keys("mixers"))
def test_every_mixer_shows_what_it_has_and_nothing_else(key: str, converted: Callable[..., Any]) -> None:
    model = converted(key, "LSL", settings=small(key))
    found = run_probe(PROBE, model)
    assert found["tokens"] == 64 and [at["layer"] for at in found["layers"]] == [0, 2]
    for at, attn in zip(found["layers"], swapped(model).values(), strict=True):
        decays = [m for m in attn.mixer.modules() if isinstance(m, Decay) and m.granularity != "none"]
        combines = [m for m in attn.mixer.modules() if isinstance(m, Combine)]
        assert (at["decay"] is not None) == bool(decays) and (at["window"] is not None) == bool(combines)
        for head in at["decay"] or []:
            assert 2**-4 <= head["low"] <= head["median"] <= head["high"] <= 2**20
        for head in at["window"] or []:
            assert 0 <= head["weight"] <= 1 and 0 < head["size"] < 1
    assert Gates.views({"one": found})


def test_constant_decays_are_those_of_the_paper(converted: Callable[..., Any]) -> None:
    """RetNet: 1 - 2^(-5 - 4 h / (H - 1)), section 2.1."""
    found = run_probe(PROBE, converted("retnet", "L"))
    for h, head in enumerate(found["layers"][0]["decay"]):
        life = -math.log(2) / math.log(1 - 2 ** (-5 - 4 * h / 3))
        assert head["mean"] == pytest.approx(life, rel=1e-5)
        assert [head["low"], head["median"], head["high"]] == pytest.approx([life] * 3, rel=0.05)
    curve = found["lives"]
    assert curve[0][1] == 1.0 and curve[-1][1] == 0.0
    assert all(a[0] < b[0] and a[1] >= b[1] for a, b in pairwise(curve))
    assert next(share for life, share in curve if life > 30) == 0.75, "one head of four forgets faster"


def test_data_dependent_gates_equal_their_formula(converted: Callable[..., Any]) -> None:
    """Gated DeltaNet: g = -exp(A) softplus(x W + b), beta = sigmoid(x W + b)."""
    model = converted("gdn", "L")
    (attn,) = swapped(model).values()
    given: list[torch.Tensor] = []
    hook = attn.register_forward_pre_hook(lambda m, args, kw: given.append(kw["hidden_states"]), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=windows(32, 2))
    hook.remove()
    x, decay, beta = given[0].flatten(0, 1), attn.mixer.decay, attn.mixer.update.beta
    rate = (decay.log_rate.exp() * F.softplus(x @ decay.weight.T + decay.bias)).detach().double()  # [tokens, H]
    (layer,) = run_probe(PROBE, model)["layers"]
    assert layer["write"] == pytest.approx((x @ beta.weight.T + beta.bias).sigmoid().mean(0).tolist(), rel=1e-5)
    lives = math.log(2) / rate
    for h, head in enumerate(layer["decay"]):
        assert head["mean"] == pytest.approx(math.log(2) / float(rate[:, h].mean()), rel=1e-5)
        for name, q in (("low", 0.1), ("median", 0.5), ("high", 0.9)):
            around = [float(lives[:, h].quantile(max(q + by, 0.0))) for by in (-0.03, 0.03)]
            assert around[0] / 1.05 <= head[name] <= around[1] * 1.05


def test_the_share_of_the_window_by_size_equals_what_the_branches_return(converted: Callable[..., Any]) -> None:
    """Liger: half of each branch, equation 10, behind the window of 8 tokens."""
    model = converted("liger", "L")
    heads: list[torch.Tensor] = []
    (attn,) = swapped(model).values()
    hook = attn.o_proj.register_forward_pre_hook(lambda m, args: heads.append(args[0]))
    for branch in ("linear", "window"):
        with torch.no_grad(), branch_off(model, branch):
            model(input_ids=windows(32, 2))
    hook.remove()
    window, memory = (y.unflatten(-1, (4, 8)).norm(dim=-1)[:, 8:] for y in heads)
    share = (window / (window + memory)).mean((0, 1)).tolist()
    (layer,) = run_probe(PROBE, model)["layers"]
    assert [head["weight"] for head in layer["window"]] == [0.5] * 4
    assert [head["size"] for head in layer["window"]] == pytest.approx(share, rel=1e-4)


def test_windows_that_hide_the_recurrent_branch_are_said(converted: Callable[..., Any]) -> None:
    found = run_probe({**PROBE, "length": 8}, converted("liger", "LSL"))
    assert all(at["window"] is None for at in found["layers"])
    assert "set `length` higher" in found["notes"][0]


@pytest.mark.parametrize("key", registry.keys("mixers.parts.combines"))
def test_what_the_window_does_not_say_is_the_recurrent_branchs(key: str) -> None:
    """The output less weight times window points where the recurrent branch's read-out does."""
    torch.manual_seed(0)
    combine = build(registry.find("mixers.parts.combines", key, Combine).Config(), SHAPE)
    for parameter in combine.parameters():
        torch.nn.init.normal_(parameter)
    out, lse, read = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 4), torch.randn(2, 5, 4, 8)
    window, memory = Window(out, lse, lse - 0.5), Memory(read, torch.rand(2, 5, 4) + 0.1)
    x = torch.randn(2, 5, 32)
    weight = combine.window_weight(window, memory, x)
    assert weight is not None and weight.shape == (2, 5, 4)
    rest = combine(window, memory, x) - weight[..., None] * out
    cosine = F.cosine_similarity(rest, read, dim=-1)
    assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-4)
    assert not torch.allclose(F.cosine_similarity(rest, out, dim=-1).abs(), torch.ones_like(cosine), atol=1e-2)
