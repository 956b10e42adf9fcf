"""Every update against its paper's recurrence, token by token and head by head."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from part_cases import HEADS, HIDDEN, KEY_DIM, KV_HEADS, SHAPE, VALUE_DIM, assert_equal, built, randn

from linearize.mixers.parts.base import Calibration
from linearize.mixers.parts.decays.base import Gate
from linearize.registry import keys

T, SCALE = 21, 0.7
Tensors = list[torch.Tensor]


def to_one(x: torch.Tensor) -> torch.Tensor:
    """x at length 1, up to the 1e-6 that keeps the zero vector from dividing by zero."""
    return x / math.sqrt(float((x * x).sum()) + 1e-6)


def gated(part: Any, x: torch.Tensor, h: int) -> float:
    """x W + b of a gate per head; without b where there is none."""
    return float(sum(x[c] * part.weight[h, c] for c in range(HIDDEN)) + (0 if part.bias is None else part.bias[h]))


def strength(part: Any, x: torch.Tensor, h: int) -> float:
    return part.limit / (1 + math.exp(-gated(part, x, h)))


def softplus(z: float) -> float:
    return math.log(1 + math.exp(z))


def decayed(g: Any, t: int, S: torch.Tensor) -> torch.Tensor:
    """diag(exp g_t) S for S [F, ...], g [T], [T, F] or None."""
    return S if g is None else (g[t].exp() * S if g.ndim == 1 else g[t].exp()[:, None] * S)


def additive(part: Any, h: int, q: Tensors, k: Tensors, v: Tensors, g: Any, x: Tensors) -> Tensors:
    S, outputs = torch.zeros(KEY_DIM, VALUE_DIM).double(), []
    for t in range(T):
        S = decayed(g, t, S) + torch.outer(k[t], v[t])
        outputs.append(SCALE * q[t] @ S)
    return outputs


def delta(part: Any, h: int, q: Tensors, k: Tensors, v: Tensors, g: Any, x: Tensors) -> Tensors:
    S, outputs = torch.zeros(KEY_DIM, VALUE_DIM).double(), []
    for t in range(T):
        key, beta = to_one(k[t]), strength(part.beta, x[t], h)
        S = (torch.eye(KEY_DIM) - beta * torch.outer(key, key)) @ decayed(g, t, S) + beta * torch.outer(key, v[t])
        outputs.append(SCALE * to_one(q[t]) @ S)
    return outputs


def delta_product(part: Any, h: int, q: Tensors, k: Tensors, v: Tensors, g: Any, x: Tensors) -> Tensors:
    S, outputs = torch.zeros(KEY_DIM, VALUE_DIM).double(), []
    for t in range(T):
        S = decayed(g, t, S)
        steps = [(k[t], v[t])]
        steps += [(part.key[h, j] @ x[t], v[t] + part.value[h, j] @ x[t]) for j in range(part.config.steps - 1)]
        for (key, value), gate in zip(steps, part.beta, strict=True):
            key, beta = to_one(key), strength(gate, x[t], h)
            S = S - beta * torch.outer(key, key @ S) + beta * torch.outer(key, value)
        outputs.append(SCALE * to_one(q[t]) @ S)
    return outputs


def hgrn2(part: Any, h: int, q: Tensors, k: Tensors, v: Tensors, g: Any, x: Tensors) -> Tensors:
    S, outputs = torch.zeros(KEY_DIM, VALUE_DIM).double(), []
    for t in range(T):
        f = g[t].exp()
        S = f[:, None] * S + torch.outer(1 - f, v[t])
        outputs.append(SCALE * q[t] @ S)
    return outputs


def log_linear(part: Any, h: int, q: Tensors, k: Tensors, v: Tensors, g: Any, x: Tensors) -> Tensors:
    """Every pair of tokens on its own: what token s left behind, seen from token t, times the weight of its bucket."""
    outputs, is_delta, levels = [], part.config.rule == "delta", part.config.levels
    if is_delta:
        q, k = [to_one(z) for z in q], [to_one(z) for z in k]
    beta = [strength(part.beta, x[t], h) if is_delta else 1.0 for t in range(T)]
    for t in range(T):
        y = torch.zeros(VALUE_DIM).double()
        for s in range(t + 1):
            left = beta[s] * torch.outer(k[s], v[s])
            for r in range(s + 1, t + 1):
                left = decayed(g, r, left)
                left = left - beta[r] * torch.outer(k[r], k[r] @ left) if is_delta else left
            level = 0  # the tokens since the last multiples of 2, 4, 8, ...: the bits in which the positions differ
            while (t >> level) != (s >> level):
                level += 1
            level = min(level, levels - 1)
            y = y + softplus(float(part.weight[h, level] @ x[t] + part.bias[h, level])) * SCALE * q[t] @ left
        outputs.append(y)
    return outputs


def memories(part: Any, h: int, q: Tensors, k: Tensors, v: Tensors, g: Any, x: Tensors) -> Tensors:
    count = part.config.memories
    states = [torch.zeros(KEY_DIM, VALUE_DIM).double() for _ in range(count + 1)]
    outputs = []
    for t in range(T):
        scores = [math.exp(float(part.router[m] @ x[t])) for m in range(count)]
        chosen = sorted(range(count), key=lambda m: -scores[m])[: part.config.active]
        weights = {m: scores[m] / sum(scores[c] for c in chosen) for m in chosen}
        if part.config.shared:
            weights[count] = 1.0
        key, beta, y = to_one(k[t]), strength(part.inner.beta, x[t], h), torch.zeros(VALUE_DIM).double()
        for m, weight in weights.items():
            S = decayed(g, t, states[m])
            states[m] = S - beta * torch.outer(key, key @ S) + beta * torch.outer(key, v[t])
            y = y + weight * SCALE * to_one(q[t]) @ states[m]
        outputs.append(y)
    return outputs


def mlstm(part: Any, h: int, q: Tensors, k: Tensors, v: Tensors, g: Any, x: Tensors) -> Tensors:
    C, n, outputs = torch.zeros(KEY_DIM, VALUE_DIM).double(), torch.zeros(KEY_DIM).double(), []
    for t in range(T):
        write = math.exp(gated(part.input, x[t], h))
        C = g[t].exp() * C + write * torch.outer(k[t], v[t])
        n = g[t].exp() * n + write * k[t]
        outputs.append(SCALE * q[t] @ C / max(abs(float(SCALE * q[t] @ n)), 1.0))
    return outputs


def rwkv7(part: Any, h: int, q: Tensors, k: Tensors, v: Tensors, g: Any, x: Tensors) -> Tensors:
    S, outputs = torch.zeros(KEY_DIM, VALUE_DIM).double(), []
    for t in range(T):
        a = torch.sigmoid(part.up[h] @ (part.down @ x[t]) + part.bias[h])
        kappa = to_one(k[t] * part.removal_scale[h])
        written = k[t] * (1 + (a - 1) * part.write_mix[h])
        S = (torch.diag(g[t].exp()) - torch.outer(a * kappa, kappa)) @ S + torch.outer(written, v[t])
        bonus = sum(q[t][f] * written[f] * part.bonus[h, f] for f in range(KEY_DIM))
        outputs.append(SCALE * (q[t] @ S + bonus * v[t]))
    return outputs


def slots(part: Any, h: int, q: Tensors, k: Tensors, v: Tensors, g: Any, x: Tensors) -> Tensors:
    count = part.decay_channels()
    keys_held, values_held = torch.zeros(count, KEY_DIM).double(), torch.zeros(count, VALUE_DIM).double()
    outputs = []
    for t in range(T):
        for m in range(count):
            f = g[t, m].exp()
            keys_held[m] = f * keys_held[m] + (1 - f) * k[t]
            values_held[m] = f * values_held[m] + (1 - f) * v[t]
        outputs.append((SCALE * keys_held @ q[t]).softmax(0) @ values_held)
    return outputs


def ttt(part: Any, h: int, q: Tensors, k: Tensors, v: Tensors, g: Any, x: Tensors) -> Tensors:
    """Gradients by automatic differentiation, all of a mini-batch's at its first weights."""

    def f(z: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        inner = z @ W + b
        centred = inner - inner.mean()
        return z + part.norm_weight[h] * centred / (centred.square().mean() + 1e-6).sqrt() + part.norm_bias[h]

    W, b, outputs = part.start_weight[h], part.start_bias[h], []
    for first in range(0, T, part.config.batch_tokens):
        now_W, now_b = W, b
        for t in range(first, min(first + part.config.batch_tokens, T)):
            at = [z.detach().clone().requires_grad_() for z in (W, b)]
            with torch.enable_grad():
                loss = 0.5 * (f(to_one(k[t]), *at) - v[t]).square().sum()
            d_W, d_b = torch.autograd.grad(loss, at)
            eta = part.config.rate / (1 + math.exp(-gated(part.rate, x[t], h)))
            now_W, now_b = now_W - eta * d_W, now_b - eta * d_b
            outputs.append(f(SCALE * to_one(q[t]), now_W, now_b))
        W, b = now_W, now_b
    return outputs


UPDATES: dict[str, tuple[list[dict[str, Any]], Callable[..., Tensors]]] = {
    "additive": ([{}], additive),
    "delta": (
        [{}, {"negative": True, "beta": 1.2}, {"bias": False}, {"bias": False, "negative": True, "beta": 1.0}],
        delta,
    ),
    "delta_product": ([{}, {"steps": 3, "negative": False}], delta_product),
    "hgrn2": ([{}], hgrn2),
    "log_linear": ([{}, {"rule": "delta"}, {"levels": 3}], log_linear),
    "memories": ([{}, {"active": 1, "shared": False}], memories),
    "mlstm": ([{}], mlstm),
    "rwkv7": ([{}, {"rank": 3}], rwkv7),
    "slots": ([{}, {"slots": 3}], slots),
    "ttt": ([{"batch_tokens": 8}, {"rate": 0.3, "batch_tokens": 1}], ttt),
}


def cases() -> list[tuple[str, dict[str, Any], str]]:
    """Each update with each of its settings and with every granularity of decay that it takes."""
    found = []
    for key, (many, _) in UPDATES.items():
        for settings in many:
            shape = square(key)
            found += [(key, settings, decay) for decay in built("updates", key, shape=shape, **settings).decays]
    return found


def square(key: str) -> Any:
    """The shape of the layer; TTT needs keys and values of one size."""
    return dataclasses.replace(SHAPE, key_dim=VALUE_DIM) if key == "ttt" else SHAPE


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(("key", "settings", "decay"), cases(), ids=str)
@torch.no_grad()
def test_an_update_is_its_recurrence(key: str, settings: dict, decay: str, write: bool) -> None:
    part = built("updates", key, shape=square(key), **settings)
    size = part.shape.key_dim
    q, k, v = randn(1, T, HEADS, size), randn(1, T, KV_HEADS, size, seed=1), randn(1, T, KV_HEADS, VALUE_DIM, seed=2)
    x, channels = randn(1, T, HIDDEN, seed=3), (part.decay_channels(),) if decay == "channel" else ()
    g = None if decay == "none" else -randn(1, T, HEADS, *channels, seed=4).abs() / 3
    weight = randn(1, T, HEADS, seed=5).exp() if write else None
    y, den, _ = part(
        q,
        k,
        v,
        Gate(g, weight),
        x,
        normalize=False,
        scale=SCALE,
        mask=None,
        documents=None,
        state=None,
        chunk_size=8,
        backend="torch",
    )
    assert den is None
    for h in range(HEADS):
        kv = h // (HEADS // KV_HEADS)
        values = [v[0, t, kv] * (1.0 if weight is None else weight[0, t, h]) for t in range(T)]
        own_g = None if g is None else g[0, :, h]
        expected = UPDATES[key][1](part, h, list(q[0, :, h]), list(k[0, :, kv]), values, own_g, list(x[0]))
        assert_equal(y[0, :, h], torch.stack(expected))


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@torch.no_grad()
def test_the_denominator_is_the_sum_of_all_weights(decay: str) -> None:
    part, x = built("updates", "additive"), randn(1, T, HIDDEN)
    q, k = randn(1, T, HEADS, KEY_DIM).exp(), randn(1, T, KV_HEADS, KEY_DIM, seed=1).exp()
    v, channels = randn(1, T, KV_HEADS, VALUE_DIM, seed=2), (KEY_DIM,) if decay == "channel" else ()
    g = None if decay == "none" else -randn(1, T, HEADS, *channels, seed=4).abs()
    options: dict[str, Any] = {"mask": None, "documents": None, "state": None, "chunk_size": 8, "backend": "torch"}
    y, den, _ = part(q, k, v, Gate(g), x, normalize=True, scale=SCALE, **options)
    for h in range(HEADS):
        for t in range(T):
            weights = []
            for i in range(t + 1):
                kept = torch.ones(KEY_DIM).double()
                for r in range(i + 1, t + 1):
                    kept = kept if g is None else kept * g[0, r, h].exp()
                weights.append(float((q[0, t, h] * kept * k[0, i, h // 2]).sum()))
            assert_equal(den[0, t, h], sum(weights))
            assert_equal(y[0, t, h], sum(w * v[0, i, h // 2] for i, w in enumerate(weights)))


def test_every_update_has_a_recurrence() -> None:
    assert sorted(UPDATES) == keys("mixers.parts.updates"), "write the new update's recurrence out in this file"


@torch.no_grad()
def test_a_write_strength_without_bias_starts_at_half_its_limit_and_stays_there_in_calibration() -> None:
    x, measured = randn(1, T, HIDDEN), Calibration(torch.full((HEADS,), 9.0), torch.full((HEADS,), 0.25))
    for negative, limit in ((False, 1.0), (True, 2.0)):
        part = built("updates", "delta", moved=False, negative=negative, beta=limit / 2, bias=False)
        assert [name for name, _ in part.named_parameters()] == ["beta.weight"]
        assert_equal(part.beta(x), torch.full((1, T, HEADS), limit / 2).double())
        part.calibrate(measured)
        assert_equal(part.beta(x), torch.full((1, T, HEADS), limit / 2).double())
    biased = built("updates", "delta", moved=False)
    biased.calibrate(measured)
    assert_equal(biased.beta(x), torch.full((1, T, HEADS), 0.6, dtype=torch.float64))  # 0.3 + 0.4 (1 - 0.25)


def test_a_first_write_strength_needs_a_bias() -> None:
    with pytest.raises(
        ValueError, match=r"update.beta cannot start at 0.3 without a bias; set it to 0.5, or update.bias"
    ):
        built("updates", "delta", beta=0.3, bias=False)
