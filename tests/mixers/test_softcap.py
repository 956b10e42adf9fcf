"""A source's cap on logits, softcap * tanh(logit / softcap), in the softmax of mixers, written out key by key."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from part_cases import SHAPE, assert_equal, randn, started

from linearize import registry
from linearize.hf.auto import find_class
from linearize.mixers.base import Context, HeadShape, Mixer, branch_off, config_from_dict
from linearize.mixers.parts.window import LocalWindow
from linearize.testing.calls import HEADS, HIDDEN, KEY_DIM, KV_HEADS, VALUE_DIM, inputs, rotate, run, run_pieces

CAP = 0.7


def cap(score: float) -> float:
    return CAP * math.tanh(score / CAP)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("lolcats", {"window": 8, "sinks": 3}),
        ("liger", {"window": 8}),
        ("still", {"window": 4, "bank": 0}),  # blocks: the query's own and the one before it
    ],
)
@torch.no_grad()
def test_without_its_linear_branch_a_mixer_is_a_softmax_window_with_capped_logits(key: str, settings: dict[str, Any]):
    T, shape = 40, HeadShape(HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, HIDDEN, scale=0.4, softcap=CAP)
    cls = registry.find("mixers", key, Mixer)
    mixer = cls(config_from_dict(cls.Config, settings, find_class), shape)
    mixer.initialise("mixer", seed=0)
    given = inputs(1, T, dtype=torch.float64)
    with branch_off(mixer.double(), "linear") as touched:
        results = [run(mixer, given)[0], run_pieces(mixer, given, [17, *[1] * 23])[0]]
    positions = torch.arange(T)[None]
    q, k, v = rotate(given[0], positions)[0], rotate(given[1], positions)[0], given[2][0]
    expected = torch.zeros(T, HEADS, VALUE_DIM).double()
    for t in range(T):
        if key == "still":
            seen = list(range(max(0, t // 4 - 1) * 4, t + 1))
        else:
            seen = [i for i in range(t + 1) if t - i < 8 or i < settings.get("sinks", 0)]
        for h in range(HEADS):
            own = h // (HEADS // KV_HEADS)
            weights = [math.exp(cap(0.4 * float(q[t, h] @ k[i, own]))) for i in seen]
            for i, weight in zip(seen, weights, strict=True):
                expected[t, h] += weight / sum(weights) * v[i, own]
    assert touched == 1
    for y in results:
        assert_equal(y[0], expected)


@torch.no_grad()
def test_meta_tokens_are_capped_keys_whose_bias_comes_after_the_cap():
    T, window, count = 12, 5, 3
    local = started(LocalWindow(window, 0, count, dataclasses.replace(SHAPE, softcap=CAP)))
    q, bare = randn(1, T, SHAPE.heads, SHAPE.key_dim), randn(1, T, SHAPE.heads, SHAPE.key_dim, seed=9)
    k = randn(1, T, SHAPE.kv_heads, SHAPE.key_dim, seed=1)
    v = randn(1, T, SHAPE.kv_heads, SHAPE.value_dim, seed=2)
    (out, lse, peak), _ = local(q, k, v, Context(lambda q, k: (q, k)), None, bare)
    for h in range(SHAPE.heads):
        own = h // (SHAPE.heads // SHAPE.kv_heads)
        for t in range(T):
            near = range(max(0, t - window + 1), t + 1)
            scores = [cap(SHAPE.scale * float(q[0, t, h] @ k[0, i, own])) for i in near]
            scores += [
                cap(SHAPE.scale * float(bare[0, t, h] @ local.meta_k[h, m])) + float(local.meta_bias[h, m])
                for m in range(count)
            ]
            values = [*(v[0, i, own] for i in near), *local.meta_v[h]]
            total = sum(math.exp(s) for s in scores)
            mean = sum(math.exp(s) / total * value for s, value in zip(scores, values, strict=True))
            assert_equal(out[0, t, h], mean)
            assert_equal(lse[0, t, h], math.log(total))
            assert_equal(peak[0, t, h], max(scores))
