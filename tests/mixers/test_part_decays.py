"""Every decay against its paper's formula written out number by number, and how decays and write strengths begin."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from part_cases import (
    HEADS,
    HIDDEN,
    KEY_DIM,
    KV_HEADS,
    SHAPE,
    Vector,
    assert_equal,
    built,
    cases,
    dot,
    randn,
    sigmoid,
    softplus,
    started,
)

from linearize.mixers.parts.base import Calibration
from linearize.mixers.parts.decays.base import GatedDecay
from linearize.mixers.parts.updates.base import WriteStrength
from linearize.registry import keys


def low_rank(part: Any, h: int, f: int, x: Vector, which: Any = ...) -> float:
    down, up = part.down[which], part.up[which]
    inner = [dot(x, down[r]) for r in range(down.shape[0])]
    return dot(inner, up[h, f])


def channel_decay(part: Any, x: Vector, h: int, f: int) -> float:
    z = low_rank(part, h, f, x) + float(part.bias[h, f])
    if part.config.activation == "softplus":
        return -math.exp(float(part.log_rate[h, 0])) * softplus(z)
    if part.config.activation == "bounded":
        return -math.exp(-0.5) * sigmoid(z)
    return math.log(sigmoid(z)) / part.config.normalizer


def refined(part: Any, x: Vector, h: int, f: int) -> float:
    forget = sigmoid(low_rank(part, h, f, x, 0) + float(part.bias[h, f]))
    r = sigmoid(low_rank(part, h, f, x, 1) + float(part.refine_bias[h, f]))
    return math.log((1 - r) * forget**2 + r * (1 - (1 - forget) ** 2))


def head_z(part: Any, x: Vector, h: int) -> float:
    return dot(x, part.weight[h]) + float(part.bias[h])


def fixed(part: Any, x: Vector, k: list[Vector]) -> Vector:
    if part.config.schedule == "retnet":
        return [math.log(1 - 2.0**-e) for e in (5, 5 + 4 / 3, 5 + 8 / 3, 9)]
    return [-(2.0**-e) for e in (2, 4, 6, 8)]


def per_head(g: Callable[[Any, Vector, int], float]) -> Callable[[Any, Vector, list[Vector]], Any]:
    return lambda part, x, k: [g(part, x, h) for h in range(HEADS)]


def per_channel(g: Callable[[Any, Vector, int, int], float]) -> Callable[[Any, Vector, list[Vector]], Any]:
    return lambda part, x, k: [[g(part, x, h, f) for f in range(KEY_DIM)] for h in range(HEADS)]


def from_k(part: Any, x: Vector, k: list[Vector]) -> Any:
    return [[math.log(sigmoid(value)) / part.config.normalizer for value in head] for head in k]


DECAYS: dict[str, tuple[list[dict[str, Any]], Callable[[Any, Vector, list[Vector]], Any]]] = {
    "none": ([{}], lambda part, x, k: None),
    "fixed": ([{"schedule": "retnet"}, {"schedule": "lightning"}], fixed),
    "from_k": ([{}, {"normalizer": 2.0}], from_k),
    "scalar": (
        [{}, {"write": True}],
        per_head(lambda part, x, h: -math.exp(float(part.log_rate[h])) * softplus(head_z(part, x, h))),
    ),
    "sigmoid": ([{}], per_head(lambda part, x, h: math.log(sigmoid(head_z(part, x, h))))),
    "low_rank": (
        [{}, {"normalizer": 4.0, "rank": 3}, {"activation": "softplus"}, {"activation": "bounded"}],
        per_channel(channel_decay),
    ),
    "refining": ([{}, {"rank": 3}], per_channel(refined)),
}


@cases(DECAYS)
@torch.no_grad()
def test_a_decay_is_its_formula(key: str, settings: dict) -> None:
    part, x, k = built("decays", key, **settings), randn(2, 3, HIDDEN), randn(2, 3, KV_HEADS, KEY_DIM, seed=1)
    gate = part(x, k)
    expected = [[DECAYS[key][1](part, x[b, t].tolist(), k[b, t].tolist()) for t in range(3)] for b in range(2)]
    if key == "none":
        assert gate.log_decay is None and gate.write is None
        return
    assert_equal(gate.log_decay, expected)
    assert gate.log_decay.ndim == {"head": 3, "channel": 4}[part.granularity] and (gate.log_decay < 0).all()
    if not settings.get("write"):
        assert gate.write is None
        return
    written = [
        [[softplus(head_z(part, x[b, t].tolist(), h)) for h in range(HEADS)] for t in range(3)] for b in range(2)
    ]
    assert_equal(gate.write, written)


@pytest.mark.parametrize("bias", [-60.0, -5.0, 0.0, 5.0, 60.0])
@pytest.mark.parametrize("refine", [-60.0, 0.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_refined_decay_never_grows_the_state(bias: float, refine: float, dtype: torch.dtype) -> None:
    part = built("decays", "refining").to(dtype)
    part.bias.data.fill_(bias)
    part.refine_bias.data.fill_(refine)
    x = (10 * randn(1, 50, HIDDEN)).to(dtype).requires_grad_()
    g = part(x, randn(1, 50, KV_HEADS, KEY_DIM).to(dtype)).log_decay
    assert g.isfinite().all() and (g <= 0).all()
    assert torch.autograd.grad(g.sum(), x)[0].isfinite().all()


GATED = [
    (key, s) for key, (many, _) in DECAYS.items() for s in many if isinstance(built("decays", key, **s), GatedDecay)
]
every_gated = pytest.mark.parametrize(("key", "settings"), GATED, ids=str)


@every_gated
@torch.no_grad()
def test_the_first_decay_of_a_head_halves_after_its_half_life(key: str, settings: dict) -> None:
    part = built("decays", key, moved=False, half_life=(8.0, 512.0), **settings)
    g = part(randn(1, 4, HIDDEN), randn(1, 4, KV_HEADS, KEY_DIM)).log_decay
    for h, half_life in enumerate((8.0, 32.0, 128.0, 512.0)):
        kept = (g[0, :, h] * half_life).exp()
        torch.testing.assert_close(kept, torch.full_like(kept, 0.5), atol=1e-9, rtol=0)


@every_gated
@torch.no_grad()
def test_calibration_sets_half_lives_to_the_distance_of_attention(key: str, settings: dict) -> None:
    part, distance = built("decays", key, moved=False, **settings), [2.0, 10.5, 100.0, 3000.0]
    part.calibrate(Calibration(torch.tensor(distance), torch.zeros(HEADS)))
    g = part(randn(1, 4, HIDDEN), randn(1, 4, KV_HEADS, KEY_DIM)).log_decay
    for h in range(HEADS):
        torch.testing.assert_close(
            g[0, :, h], torch.full_like(g[0, :, h], -math.log(2) / distance[h]), atol=0, rtol=1e-9
        )
    part.calibrate(Calibration(torch.tensor([0.0, 0.5, 1.0, 1.0]), torch.zeros(HEADS)))  # all attend to themselves
    g = part(randn(1, 4, HIDDEN), randn(1, 4, KV_HEADS, KEY_DIM)).log_decay
    least = -0.999 * math.exp(-0.5) if settings.get("activation") == "bounded" else -math.log(2)
    torch.testing.assert_close(g, torch.full_like(g, least), atol=0, rtol=1e-9)


@pytest.mark.parametrize("limit", [1.0, 2.0])
@torch.no_grad()
def test_write_strengths_begin_as_asked_and_follow_the_sharpness_of_attention(limit: float) -> None:
    part, x = started(WriteStrength(SHAPE, 0.7, limit), moved=False), randn(1, 3, HIDDEN)
    assert_equal(part(x), [[[0.7] * HEADS] * 3])
    part.calibrate(Calibration(torch.ones(HEADS), torch.tensor([0.0, 0.25, 1.0, 1.2])))
    torch.testing.assert_close(part(x)[0, 0], torch.tensor([0.7, 0.6, 0.3, 0.3]).double(), atol=1e-7, rtol=0)
    moved = started(WriteStrength(SHAPE, 0.7, limit))
    assert_equal(
        moved(x)[0], [[limit * sigmoid(head_z(moved, x[0, t].tolist(), h)) for h in range(HEADS)] for t in range(3)]
    )


def test_every_decay_has_a_formula() -> None:
    assert sorted(DECAYS) == keys("mixers.parts.decays"), "write the new decay's formula out in this file"
