"""The probe state_norms against states made token by token, and the matrices of states against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from evals.probes.subjects import run_probe, small, windows

from linearize import registry
from linearize.arguments import cache_of, continued
from linearize.evals.probes.state_norms import effective_rank
from linearize.swap import swapped

PROBE = {"type": "state_norms", "windows": 2}


CASES = [("llama", key) for key in registry.keys("mixers")]
CASES += [(family, "gdn") for family in ("gpt2", "gpt_neox", "gemma2", "phi3", "mistral")]


@pytest.mark.parametrize(("family", "key"), CASES)
def test_equals_the_states_of_reading_token_by_token(family: str, key: str, converted: Callable[..., Any]) -> None:
    layers = {"layer_types": ["sliding_attention"] * 2} if family == "gemma2" else {}
    model = converted(key, "LS", settings=small(key), family=family, **layers)
    found = run_probe({**PROBE, "times": 3}, model)
    (attn,) = swapped(model).values()
    ids, cache = windows(96, 2), None
    expected = []
    for t in range(96):
        with torch.no_grad():
            cache = cache_of(continued(model, cache, input_ids=ids[:, t : t + 1]))
        if t + 1 in (64, 96):
            held = attn.mixer.matrices(cache.layers[0].state)
            assert held and all(m.ndim == 4 and len(m) == 2 for m in held)
            entries = torch.cat([m.double().flatten() for m in held])
            expected.append(math.sqrt(float(entries.square().mean())))
    (layer,) = found["layers"]
    assert [point["tokens"] for point in layer["points"]] == [64, 96]
    assert [point["rms"] for point in layer["points"]] == pytest.approx(expected, rel=1e-3)
    assert layer["growth"] == pytest.approx(math.log(expected[1] / expected[0]) / math.log(96 / 64), abs=1e-2)
    assert 0 < layer["rank"] <= layer["full_rank"] * (1 + 1e-6)


def test_a_sum_grows_and_is_named_and_a_decaying_state_is_not(converted: Callable[..., Any]) -> None:
    probe = {**PROBE, "times": 32}
    plain, decaying = (run_probe(probe, converted(key, "LS")) for key in ("hedgehog", "lightning"))
    assert 0.4 < plain["layers"][0]["growth"] < 1.1
    assert any("still grows after 1024 tokens in layers 0" in note for note in plain["notes"])
    assert decaying["layers"][0]["growth"] < 0.2
    assert not any("grows" in note for note in decaying["notes"])


def test_growth_is_not_taken_from_neighbouring_tokens(converted: Callable[..., Any]) -> None:
    """257 tokens are one more than the last doubling, over which any noise would be an enormous power."""
    student = converted("gdn", "LS")
    even, odd = (run_probe({**PROBE, "times": 1}, student, seq_len=n)["layers"][0]["growth"] for n in (256, 257))
    assert odd == pytest.approx(even, abs=0.2)


def test_a_state_that_is_not_finite_is_named(converted: Callable[..., Any]) -> None:
    model = converted("hedgehog", "LS")
    next(iter(swapped(model).values())).v_proj.weight.data *= 1e38
    found = run_probe(PROBE, model)
    assert found["layers"][0]["rank"] is None and found["layers"][0]["points"][-1]["rms"] is None
    assert any("not finite in layers 0" in note for note in found["notes"])


def test_effective_rank_of_known_matrices() -> None:
    half = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
    one = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0, 2.0]))
    broken = torch.full((3, 3), math.inf)
    found = effective_rank(torch.stack([torch.eye(3), one, half, torch.zeros(3, 3), broken])[None].double())[0]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found[:4].tolist() == pytest.approx([3.0, 1.0, math.exp(entropy), 0.0], abs=1e-6)
    assert found[4].isnan()


def test_the_matrices_of_stabilised_and_levelled_states(converted: Callable[..., Any]) -> None:
    """mLSTM keeps C divided by exp(m); log-linear attention keeps a sum in parts."""
    q, k, v = (torch.randn(1, 40, 2, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    g = -torch.rand(1, 40, 2, generator=torch.Generator().manual_seed(3))
    i = 3 * torch.randn(1, 40, 2, generator=torch.Generator().manual_seed(4))
    plain, gated = torch.zeros(2, 8, 8, dtype=torch.float64), torch.zeros(2, 8, 8, dtype=torch.float64)
    for t in range(40):
        outer = k[0, t, :, :, None].double() * v[0, t, :, None, :].double()
        decay = g[0, t].double().exp()[:, None, None]
        plain, gated = decay * plain + outer, decay * gated + i[0, t].double().exp()[:, None, None] * outer
    from linearize.ops.log_linear import log_linear
    from linearize.ops.mlstm import mlstm

    (matrix_memory,) = swapped(converted("mlstm_swa", "L")).values()
    (C,) = matrix_memory.mixer.update.matrices(mlstm(q, k, v, g, i)[1])
    assert torch.allclose(C[0], gated, rtol=1e-4, atol=1e-5)
    (levelled,) = swapped(converted("log_linear", "L")).values()
    (S,) = levelled.mixer.update.matrices(log_linear(q, k, v, g, torch.ones(1, 40, 2, 12))[1])
    assert S.shape == (1, 24, 8, 8)
    assert torch.allclose(S.unflatten(1, (2, 12)).sum(2)[0].double(), plain, rtol=1e-4, atol=1e-5)


def test_the_matrix_of_test_time_training_is_what_a_query_reads(converted: Callable[..., Any]) -> None:
    """A token that learns nothing, in the middle of a mini-batch: y = q + LN(q W + b) with the matrix as W."""
    from linearize.ops.ttt import ttt_linear

    q, k, v = (torch.randn(1, 21, 2, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    eta = torch.full((1, 21, 2), 0.5)
    eta[:, -1] = 0.0
    ones, zeros = torch.ones(2, 8), torch.zeros(2, 8)
    start = 0.1 * torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(5))
    y, state = ttt_linear(q, k, v, eta, ones, zeros, start, zeros)
    (attn,) = swapped(converted("ttt", "L")).values()
    (W,) = attn.mixer.update.matrices(state)
    assert not torch.allclose(W, state[0]), "the mini-batch has begun"
    last = q[0, -1]
    z = torch.einsum("hk,hkv->hv", last, W[0]) + (state[1] - state[3])[0]
    assert torch.allclose(y[0, -1], last + torch.nn.functional.layer_norm(z, (8,), eps=1e-6), atol=1e-4)
