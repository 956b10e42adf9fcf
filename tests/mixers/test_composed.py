"""What the composed mixer adds around its parts: convolution, meta tokens, cloned heads, norms, output and skip."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from part_cases import HEADS, HIDDEN, KEY_DIM, KV_HEADS, SHAPE, VALUE_DIM, assert_equal, randn, started

from linearize.hf.auto import find_class
from linearize.mixers.base import Context, config_from_dict
from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.conv import Conv, ConvConfig
from linearize.mixers.parts.output import Output, OutputConfig
from linearize.mixers.parts.window import LocalWindow

T = 19
Heads = list[torch.Tensor]


def given(seed: int = 0) -> Heads:
    """q [1, T, Hq, K], k [1, T, Hkv, K], v [1, T, Hkv, V], x [1, T, C]."""
    sizes = [(HEADS, KEY_DIM), (KV_HEADS, KEY_DIM), (KV_HEADS, VALUE_DIM), (HIDDEN,)]
    return [randn(1, T, *size, seed=seed + i) for i, size in enumerate(sizes)]


def context(documents: list[int] | None = None) -> Context:
    """Positions leave queries and keys as they are, but for a factor that shows whether they were asked for."""
    ids = None if documents is None else torch.tensor([[n for n, many in enumerate(documents) for _ in range(many)]])
    return Context(lambda q, k: (2 * q, 3 * k), None, ids)


def composed(moved: bool = True, shape: Any = SHAPE, **settings: Any) -> Composed:
    mixer = Composed(config_from_dict(ComposedConfig, {"rope": "none", **settings}, find_class), shape)
    return started(mixer, moved=moved)


def linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Plain linear attention [T, H, V]: y_t = sum_{i <= t} scale (q_t . k_i) v_i; k and v [1, T, H or Hkv, D]."""
    y = torch.zeros(T, HEADS, VALUE_DIM).double()
    for h in range(HEADS):
        kv = h // (HEADS // k.shape[2])
        for t in range(T):
            for i in range(t + 1):
                y[t, h] += scale * (q[0, t, h] @ k[0, i, kv]) * v[0, i, kv]
    return y


@pytest.mark.parametrize("inputs", ["qkv", "qk", "kv", "v"])
@torch.no_grad()
def test_a_convolution_changes_nothing_at_first(inputs: str) -> None:
    q, k, v, _ = given()
    conv = started(Conv(ConvConfig(size=4, inputs=inputs), SHAPE), moved=False)
    for result, before in zip(conv(q, k, v, context(), None)[:3], (q, k, v), strict=True):
        assert torch.equal(result, before)


@pytest.mark.parametrize("documents", [[T], [5, 1, 13]])
@torch.no_grad()
def test_a_convolution_sees_the_last_tokens_of_its_document(documents: list[int]) -> None:
    size, heads = 4, given()[:3]
    conv = started(Conv(ConvConfig(size=size), SHAPE))
    results = conv(*heads, context(documents), None)
    for name, x, result in zip("qkv", heads, results, strict=False):
        expected, first = torch.zeros_like(x), 0
        for many in documents:
            for t in range(first, first + many):
                for back in range(size):
                    if t - back >= first:
                        expected[0, t] += conv.taps(name)[..., size - 1 - back] * x[0, t - back]
            first += many
        assert_equal(result, expected)


@pytest.mark.parametrize("inputs", ["qkv", "v"])
@torch.no_grad()
def test_an_activation_follows_the_convolution_of_what_is_convolved(inputs: str) -> None:
    heads = given()[:3]
    plain, curved = (
        started(Conv(ConvConfig(size=4, inputs=inputs, activation=name), SHAPE)) for name in ("none", "silu")
    )
    for name, before, result in zip(
        "qkv", plain(*heads, context(), None), curved(*heads, context(), None), strict=False
    ):
        expected = [z / (1 + math.exp(-z)) for z in before.flatten().tolist()] if name in inputs else before.flatten()
        assert_equal(result.flatten(), expected)


@torch.no_grad()
def test_a_convolution_goes_on_from_its_state() -> None:
    heads, conv = given()[:3], started(Conv(ConvConfig(size=4), SHAPE))
    whole, state, found = conv(*heads, context(), None)[:3], None, []
    for first, last in ((0, 2), (2, 3), (3, T)):
        *pieces, state = conv(*(x[:, first:last] for x in heads), context(), state)
        found.append(pieces)
    for pieces, expected in zip(zip(*found, strict=True), whole, strict=True):
        assert_equal(torch.cat(pieces, dim=1), expected)


@pytest.mark.parametrize("sinks", [0, 2])
@torch.no_grad()
def test_meta_tokens_are_more_keys_of_the_softmax(sinks: int) -> None:
    window, count = 5, 3
    local, (q, k, v, _) = started(LocalWindow(window, sinks, count, SHAPE)), given()
    bare = randn(1, T, HEADS, KEY_DIM, seed=9)
    (out, lse, peak), _ = local(q, k, v, context(), None, bare)
    for h in range(HEADS):
        for t in range(T):
            seen = [i for i in range(t + 1) if t - i < window or i < sinks]
            scores = [SHAPE.scale * float(q[0, t, h] @ k[0, i, h // 2]) for i in seen]
            scores += [
                SHAPE.scale * float(bare[0, t, h] @ local.meta_k[h, m]) + float(local.meta_bias[h, m])
                for m in range(count)
            ]
            values = [v[0, i, h // 2] for i in seen] + [local.meta_v[h, m] for m in range(count)]
            total = sum(math.exp(s) for s in scores)
            assert_equal(
                out[0, t, h], sum(math.exp(s) / total * value for s, value in zip(scores, values, strict=True))
            )
            assert_equal(lse[0, t, h], math.log(total))
            assert_equal(peak[0, t, h], max(scores))


@torch.no_grad()
def test_meta_tokens_hardly_weigh_at_first() -> None:
    q, k, v, _ = given()
    (out, _, _), _ = started(LocalWindow(5, 0, 3, SHAPE), moved=False)(q, k, v, context(), None, q)
    (plain, _, _), _ = started(LocalWindow(5, 0, 0, SHAPE), moved=False)(q, k, v, context(), None, q)
    # three values of zero, each with at most exp(-4) beside a sum of weights that is mostly above 1
    assert float((out - plain).norm() / plain.norm()) < 0.05


@pytest.mark.parametrize("norm", ["none", "rms", "group"])
@pytest.mark.parametrize("gate", ["none", "sigmoid", "silu"])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize(("bias", "eps"), [(True, 1e-5), (False, 0.3)])
@torch.no_grad()
def test_the_output_is_normed_gated_and_scaled(norm: str, gate: str, rank: int | None, bias: bool, eps: float) -> None:
    config = OutputConfig(norm, gate, rank, gate_bias=bias, scale=True, eps=eps)  # type: ignore[arg-type]
    part = started(Output(config, SHAPE))
    assert hasattr(part, "gate_bias") == (bias and gate != "none")
    y, x = randn(1, T, HEADS, VALUE_DIM), randn(1, T, HIDDEN, seed=1)
    result = part(y, x)
    for h in range(HEADS):
        for t in range(T):
            expected = y[0, t, h].tolist()
            if norm != "none":
                mean = sum(expected) / VALUE_DIM if norm == "group" else 0.0
                expected = [value - mean for value in expected]
                deviation = math.sqrt(sum(value**2 for value in expected) / VALUE_DIM + eps)
                expected = [
                    value / deviation * float(w) for value, w in zip(expected, part.norm_weight[h], strict=True)
                ]
            if gate != "none":
                z = x[0, t] if rank is None else part.gate_down @ x[0, t]
                zs = [float(part.gate_up[h, c] @ z + (part.gate_bias[h, c] if bias else 0)) for c in range(VALUE_DIM)]
                gates = [(z if gate == "silu" else 2.0) / (1 + math.exp(-z)) for z in zs]
                expected = [value * g for value, g in zip(expected, gates, strict=True)]
            assert_equal(result[0, t, h], [value * float(part.scale[h]) for value in expected])


@pytest.mark.parametrize("gate", ["sigmoid", "silu"])
@pytest.mark.parametrize("rank", [None, 3])
def test_a_gate_starts_at_exactly_one_and_can_learn(gate: str, rank: int | None) -> None:
    part = started(Output(OutputConfig(gate=gate, gate_rank=rank), SHAPE), moved=False).float()  # type: ignore[arg-type]
    y, x = randn(1, T, HEADS, VALUE_DIM).float(), randn(1, T, HIDDEN, seed=1).float()
    result = part(y, x)
    assert torch.equal(result, y)
    result.square().sum().backward()
    for name in ("gate_up", "gate_bias"):
        assert (getattr(part, name).grad != 0).all(), name


@pytest.mark.parametrize("gate", ["sigmoid", "silu"])
@pytest.mark.parametrize("rank", [None, 3])
def test_a_gate_without_bias_can_learn(gate: str, rank: int | None) -> None:
    """A doubled sigmoid of zero is one; silu of zero would be zero, so its projection starts with unit variance."""
    config = OutputConfig(gate=gate, gate_rank=rank, gate_bias=False)  # type: ignore[arg-type]
    part = started(Output(config, SHAPE), moved=False).float()
    y, x = randn(1, T, HEADS, VALUE_DIM).float(), randn(1, T, HIDDEN, seed=1).float()
    result = part(y, x)
    assert torch.equal(result, y) if gate == "sigmoid" else result.std() > 0.2
    assert gate == "sigmoid" or float(part.gate_up.detach().std()) == pytest.approx((rank or HIDDEN) ** -0.5, rel=0.3)
    result.square().sum().backward()
    assert (part.gate_up.grad != 0).all()


def test_settings_of_the_output_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="output.eps must be a positive number, got 0"):
        OutputConfig(eps=0.0)


@pytest.mark.parametrize("window", [0, 5])
@torch.no_grad()
def test_cloned_heads_start_as_the_shared_ones_bit_for_bit(window: int) -> None:
    q, k, v, x = given()
    settings: dict[str, Any] = {"window": window, "feature_map": "softmax", "conv": {"size": 3}}
    shared, cloned = (composed(moved=False, kv_heads=how, **settings) for how in ("shared", "cloned"))
    expected, _ = shared(q, k, v, x, context())
    result, _ = cloned(q, k, v, x, context())
    assert torch.equal(result, expected)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(("feature_map", "decay"), [("softmax", "from_k"), ("hedgehog", "low_rank")])
@torch.no_grad()
def test_cloned_heads_are_heads_of_their_own(window: int, feature_map: str, decay: str) -> None:
    """Query head h gets the keys of its group, head h // 2, plus a projection of its own."""
    q, k, v, x = given()
    settings: dict[str, Any] = {"window": window, "feature_map": feature_map, "conv": {"size": 3}, "decay": decay}
    cloned = composed(kv_heads="cloned", **settings)
    own_k, own_v = torch.zeros(1, T, HEADS, KEY_DIM).double(), torch.zeros(1, T, HEADS, VALUE_DIM).double()
    for h in range(HEADS):
        for t in range(T):
            own_k[0, t, h] = k[0, t, h // 2] + cloned.clone_k[h] @ x[0, t]
            own_v[0, t, h] = v[0, t, h // 2] + cloned.clone_v[h] @ x[0, t]
    apart = composed(shape=dataclasses.replace(SHAPE, kv_heads=HEADS), **settings)
    apart.load_state_dict({n: t for n, t in cloned.state_dict().items() if not n.startswith("clone_")})
    assert_equal(cloned(q, k, v, x, context())[0], apart(q, own_k, own_v, x, context())[0])


@torch.no_grad()
def test_cloned_heads_decode_as_they_prefill() -> None:
    heads, cloned = given(), composed(kv_heads="cloned", window=5, conv={"size": 3})
    whole, _ = cloned(*heads, context())
    state, found = None, []
    for t in range(T):
        y, state = cloned(*(x[:, t : t + 1] for x in heads), context(), state)
        found.append(y)
    assert_equal(torch.cat(found, dim=1), whole)


@torch.no_grad()
def test_keys_and_queries_of_length_one_after_the_map() -> None:
    q, k, v, x = given()
    result, _ = composed(feature_map="silu", qk_norm="l2")(q, k, v, x, context())

    def mapped(z: torch.Tensor) -> torch.Tensor:
        z = z * z.sigmoid()
        return z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt()  # 1e-6 keeps the zero vector finite

    assert_equal(result[0], linear(mapped(q), mapped(k), v))


@torch.no_grad()
def test_keys_and_queries_normed_before_the_map() -> None:
    q, k, v, x = given()
    mixer = composed(feature_map="elu", qk_norm="rms", scale="sqrt")

    def mapped(z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        z = z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        return torch.where(z > 0, z + 1, z.exp())

    expected = linear(mapped(q, mixer.q_norm), mapped(k, mixer.k_norm), v, KEY_DIM**-0.5)
    assert_equal(mixer(q, k, v, x, context())[0][0], expected)
    assert torch.equal(composed(moved=False, qk_norm="rms").q_norm, torch.ones(KEY_DIM).double())


@torch.no_grad()
def test_the_skip_adds_the_tokens_own_value() -> None:
    q, k, v, x = given()
    mixer = composed(skip=True)
    expected = linear(q, k, v)
    for h in range(HEADS):
        expected[:, h] += float(mixer.skip[h]) * v[0, :, h // 2]
    assert_equal(mixer(q, k, v, x, context())[0][0], expected)
    first, without = composed(moved=False, skip=True), composed(moved=False)
    assert torch.equal(first(q, k, v, x, context())[0], without(q, k, v, x, context())[0])


@pytest.mark.parametrize(
    ("rope", "recurrent", "local"),
    [("both", 6.0, 6.0), ("window", 1.0, 6.0), ("recurrent", 6.0, 1.0), ("features", 6.0, 1.0), ("none", 1.0, 1.0)],
)
@torch.no_grad()
def test_positions_reach_the_branches_that_rope_names(rope: str, recurrent: float, local: float) -> None:
    """The rotation of `context` multiplies products of queries and keys by 6."""
    q, k, v, x = given()
    window = 5
    result, _ = composed(rope=rope, window=window)(q, k, v, x, context())
    expected = linear(q, k, v, recurrent)
    for h in range(HEADS):
        for t in range(T):
            near = range(max(0, t - window + 1), t + 1)
            scores = torch.stack([SHAPE.scale * local * (q[0, t, h] @ k[0, i, h // 2]) for i in near])
            expected[t, h] += scores.softmax(0) @ v[0, list(near), h // 2]
    assert_equal(result[0], expected)
