"""Feature maps and combinations, each against its paper's formula written out number by number.

A file of these packages without a formula here is an error. Decays and updates have theirs in test_part_decays.py and
test_part_updates.py, what is not a kind of its own (convolution, output, window) in test_composed.py.
"""

import importlib
import math
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from part_cases import (
    HEADS,
    HIDDEN,
    KEY_DIM,
    VALUE_DIM,
    Vector,
    assert_equal,
    built,
    cases,
    dot,
    randn,
    sigmoid,
    softmax,
    times,
)

from linearize.mixers import parts
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import Part
from linearize.mixers.parts.combines.base import Memory, Window
from linearize.registry import keys


def hedgehog(z: Vector) -> Vector:
    return softmax(z) + softmax([-value for value in z])


def norm_preserving(part: Any, h: int, x: Vector) -> Vector:
    f = times(x, part.weight[h])
    length, turned = math.sqrt(sum(v * v for v in x)), math.sqrt(sum(v * v for v in f))
    u = [value * length / turned for value in f]
    assert math.sqrt(sum(v * v for v in u)) == pytest.approx(length)
    return hedgehog(u)


def safe_exp(part: Any, h: int, x: Vector) -> Vector:
    z = times(x, part.weight[h])
    return [math.exp(value - max(z)) * math.sqrt(math.e / ((math.e - 1) * len(z))) for value in z]


def taylor(part: Any, h: int, x: Vector) -> Vector:
    """1, x and all products of two, as in the paper; the part merges those that are the same."""
    x = x if part.config.dim is None else times(x, part.weight[h])
    x = [value / len(x) ** 0.25 for value in x]
    return [1.0, *x, *(a * b / math.sqrt(2) for a in x for b in x)]


MAPS: dict[str, tuple[list[dict[str, Any]], Callable[[Any, int, Vector], Vector]]] = {
    "identity": ([{}], lambda part, h, x: x),
    "elu": ([{}], lambda part, h, x: [v + 1 if v > 0 else math.exp(v) for v in x]),
    "silu": ([{}], lambda part, h, x: [v * sigmoid(v) for v in x]),
    "softmax": ([{}], lambda part, h, x: softmax(x)),
    "relu": (
        [{}, {"start": "random"}, {"dim": 5}, {"same_size": True}],
        lambda part, h, x: [
            max(0.0, z + float(b)) for z, b in zip(times(x, part.weight[h]), part.bias[h], strict=True)
        ],
    ),
    "hedgehog": ([{}, {"dim": 4}], lambda part, h, x: hedgehog(times(x, part.weight[h]))),
    "norm_preserving": ([{}, {"dim": 4}], norm_preserving),
    "safe_exp": ([{}], safe_exp),
    "taylor": ([{}, {"dim": 3}, {"dim": None}], taylor),
}


@cases(MAPS)
@torch.no_grad()
def test_a_feature_map_is_its_formula(key: str, settings: dict) -> None:
    part, x = built("feature_maps", key, **settings), randn(2, 3, HEADS, KEY_DIM)
    features = part(x)
    expected = torch.tensor(
        [[[MAPS[key][1](part, h, x[b, t, h].tolist()) for h in range(HEADS)] for t in range(3)] for b in range(2)],
        dtype=torch.float64,
    )
    assert features.shape[-1] == part.features
    if key == "taylor":  # other features, the same products
        features, expected = (torch.einsum("bthf,bshf->bhts", f, f) for f in (features, expected))
    assert_equal(features, expected)
    if part.non_negative:
        other = part(randn(2, 3, HEADS, KEY_DIM, seed=1))
        assert (torch.einsum("bthf,bshf->bhts", part(x), other) >= 0).all()


@pytest.mark.parametrize("dim", [None, 3, 6])
@torch.no_grad()
def test_taylor_features_give_the_exponential_to_second_order(dim: int | None) -> None:
    part, q, k = (
        built("feature_maps", "taylor", dim=dim),
        randn(1, 1, HEADS, KEY_DIM),
        randn(1, 1, HEADS, KEY_DIM, seed=1),
    )
    for h in range(HEADS):
        a, b = q[0, 0, h].tolist(), k[0, 0, h].tolist()
        if dim is not None:
            a, b = times(a, part.weight[h]), times(b, part.weight[h])
        s = sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(len(a))
        assert_equal(part(q)[0, 0, h] @ part(k)[0, 0, h], 1 + s + s * s / 2)


@torch.no_grad()
def test_maps_begin_where_their_papers_do() -> None:
    x = randn(2, 3, HEADS, KEY_DIM)
    first = {key: built("feature_maps", key, moved=False) for key in ("hedgehog", "norm_preserving", "relu")}
    assert_equal(first["norm_preserving"](x), first["hedgehog"](x))
    assert_equal(first["hedgehog"](x), torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1))
    assert_equal(first["relu"](x), torch.cat([x.clamp(min=0), (-x).clamp(min=0)], dim=-1))
    stretched = built("feature_maps", "norm_preserving")
    before = stretched(x)
    stretched.weight.mul_(3.0)
    torch.testing.assert_close(stretched(x), before, atol=1e-9, rtol=1e-9)  # only the direction of x W counts


@torch.no_grad()
def test_taylor_products_keep_their_size_in_any_dimension() -> None:
    wide = HeadShape(heads=64, kv_heads=64, key_dim=32, value_dim=5, hidden_size=7, scale=1.0)
    part = built("feature_maps", "taylor", moved=False, shape=wide)
    product = torch.einsum("hdf,hef->de", part.weight, part.weight) / (64 * math.sqrt(16))
    # E[q W . k W / sqrt(dim)] = q.k / sqrt(d); the mean of 64 heads is within a few percent of it
    torch.testing.assert_close(product, torch.eye(32).double() / math.sqrt(32), atol=0.03, rtol=0.2)


def learned_z(part: Any, x: Vector, h: int) -> float:
    return dot(x, part.weight[h]) + float(part.bias[h])


def shared(part: Any, x: Vector, h: int, scores: Vector, v: list[Vector], num: Vector, den: float) -> Vector:
    factor, top = sigmoid(float(part.window_factor[h])), max(scores)
    weights = [factor * math.exp(s - top) for s in scores]
    return [
        (sum(w * value[c] for w, value in zip(weights, v, strict=True)) + num[c]) / (sum(weights) + den)
        for c in range(VALUE_DIM)
    ]


def mixed(mix: Callable[[Any, Vector, int], tuple[float, float]]) -> Callable[..., Vector]:
    """a times the window's softmax plus b times the other branch."""

    def formula(part: Any, x: Vector, h: int, scores: Vector, v: list[Vector], num: Vector, den: float) -> Vector:
        (a, b), weights = mix(part, x, h), softmax(scores)
        return [
            a * sum(w * value[c] for w, value in zip(weights, v, strict=True)) + b * num[c] for c in range(VALUE_DIM)
        ]

    return formula


def learned(part: Any, x: Vector, h: int) -> tuple[float, float]:
    m = sigmoid(learned_z(part, x, h))
    return m, 1 - m


COMBINES: dict[str, tuple[list[dict[str, Any]], Callable[..., Vector]]] = {
    "sum": ([{}], mixed(lambda part, x, h: (1.0, 1.0))),
    "average": ([{}, {"mix": 0.2}], mixed(lambda part, x, h: (part.config.mix, 1 - part.config.mix))),
    "sigmoid": ([{}, {"mix": 0.2}], mixed(learned)),
    "shared_denominator": ([{}, {"window_factor": 0.7}], shared),
}


@cases(COMBINES)
@torch.no_grad()
def test_a_combination_is_its_formula(key: str, settings: dict) -> None:
    part, x, T, near = built("combines", key, **settings), randn(1, 3, HIDDEN), 3, 4
    scores, v = 3 * randn(1, T, HEADS, near), randn(1, T, HEADS, near, VALUE_DIM, seed=1)
    window = Window((scores.softmax(-1)[..., None] * v).sum(-2), scores.logsumexp(-1), scores.amax(-1))
    memory = Memory(randn(1, T, HEADS, VALUE_DIM, seed=2), randn(1, T, HEADS, seed=3).exp())
    expected = [
        [
            COMBINES[key][1](
                part,
                x[0, t].tolist(),
                h,
                *(z[0, t, h].tolist() for z in (scores, v, memory.out)),
                float(memory.den[0, t, h]),
            )
            for h in range(HEADS)
        ]
        for t in range(T)
    ]
    assert_equal(part(window, memory, x)[0], expected)


@pytest.mark.parametrize(("key", "setting"), [("sigmoid", "mix"), ("shared_denominator", "window_factor")])
@torch.no_grad()
def test_learned_combinations_begin_as_asked(key: str, setting: str) -> None:
    part = built("combines", key, moved=False, **{setting: 0.3})
    bias = part.bias if key == "sigmoid" else part.window_factor
    assert [sigmoid(float(b)) for b in bias] == pytest.approx([0.3] * HEADS)
    assert key != "sigmoid" or not part.weight.any()


@pytest.mark.parametrize(("kind", "table"), [("feature_maps", MAPS), ("combines", COMBINES)])
def test_every_part_has_a_formula(kind: str, table: dict[str, Any]) -> None:
    assert sorted(table) == keys(f"mixers.parts.{kind}"), "write the new part's formula out in this file"


def is_part(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, Part)


def test_every_kind_of_part_has_tests() -> None:
    kinds = {m.name for m in pkgutil.iter_modules(parts.__path__) if m.ispkg}
    assert kinds == {"feature_maps", "decays", "combines", "updates"}, "write the new kind's formulas out"
    modules = [importlib.import_module(f"{parts.__name__}.{key}") for key in keys("mixers.parts")]
    found = {cls.__name__ for m in modules for cls in vars(m).values() if is_part(cls) and cls.__module__ == m.__name__}
    assert found == {"Conv", "Output", "LocalWindow"}, "write the new part's formula out in test_composed.py"
