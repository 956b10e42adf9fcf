"""What a cap on scores, softcap * tanh(score / softcap), does to window attention; that it does the same as its T x T
definition is tested in test_window.py.
"""

import pytest
import torch
from op_cases import as_leaves, assert_close, gradients

from linearize.ops.window import naive, window_attention

SCALE, CAP = 0.9, 1.5
"""Scores have a standard deviation of about 2.5, so that the cap bends most of them."""


def qkv(B: int, T: int, heads: int = 4, kv_heads: int = 2, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(B, T, heads, 8), torch.randn(B, T, kv_heads, 8), torch.randn(B, T, kv_heads, 6)]


def attend(inputs: list[torch.Tensor], window: int, sinks: int = 0, softcap: float | None = CAP, **options):
    """([out, lse, max], state)"""
    *results, state = window_attention(
        *inputs, window=window, scale=SCALE, softcap=softcap, sinks=sinks, return_max=True, **options
    )
    return results, state


def truth(inputs: list[torch.Tensor], window: int, sinks: int = 0, **options) -> list[torch.Tensor]:
    return list(naive(*(x.double() for x in inputs), window=window, scale=SCALE, softcap=CAP, sinks=sinks, **options))


def test_definition_is_softmax_of_capped_scores():
    T = 30
    q, k, v = (x.double() for x in qkv(1, T, heads=1, kv_heads=1))
    out, lse, top = naive(q, k, v, window=T, scale=SCALE, softcap=CAP)
    for t in range(T):
        scores = CAP * torch.tanh(SCALE * (k[0, : t + 1, 0] @ q[0, t, 0]) / CAP)
        assert_close([out[0, t, 0]], [scores.softmax(0) @ v[0, : t + 1, 0]], 1e-12)
        assert_close([lse[0, t, 0], top[0, t, 0]], [scores.logsumexp(0), scores.max()], 1e-12)


@pytest.mark.parametrize("T", [1, 70])
def test_without_a_cap_nothing_changes(T: int):
    leaves = as_leaves(qkv(2, T), torch.float64)
    *plain, _ = window_attention(*leaves, window=16, scale=SCALE, sinks=2, return_max=True)
    results, _ = attend(leaves, 16, 2, softcap=None)
    assert all(torch.equal(x, y) for x, y in zip(results, plain, strict=True))
    grads = gradients(plain, leaves)
    assert all(torch.equal(x, y) for x, y in zip(gradients(results, leaves), grads, strict=True))
    bare, uncapped = (naive(*leaves, window=16, scale=SCALE, **cap) for cap in ({}, {"softcap": None}))
    assert all(torch.equal(x, y) for x, y in zip(uncapped, bare, strict=True))
    # c tanh(s / c) = s - s^3 / 3 c^2 + ...
    assert_close(attend(leaves, 16, 2, softcap=1e6)[0], plain, 1e-9)
    assert not torch.allclose(attend(leaves, 16, 2)[0][1], plain[1], atol=0.1)


def test_bfloat16_scores_beyond_the_cap_are_finite():
    leaves = as_leaves([100 * x for x in qkv(1, 100)], torch.bfloat16)
    results, _ = attend(leaves, 32, 2)
    assert results[0].dtype == torch.bfloat16 and results[1].dtype == torch.float32
    assert_close(results[1:], truth([x.detach() for x in leaves], 32, 2)[1:], 1e-5)
    assert all(x.isfinite().all() for x in [*results, *gradients(results, leaves)])


@pytest.mark.parametrize("T", [1, 8])
@pytest.mark.parametrize("softcap", [0.0, -50.0])
def test_impossible_caps_are_refused(T: int, softcap: float):
    with pytest.raises(ValueError, match=f"softcap must be positive, or None .* got {softcap:g}"):
        attend(qkv(2, T), 4, softcap=softcap)
