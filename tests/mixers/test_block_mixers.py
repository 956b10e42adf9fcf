"""`still` and `linearized_llm` against their definitions, written out query by query in float64."""

import pytest
import torch
from mixer_cases import Case, assert_same_state
from ops.op_cases import assert_close, random_splits

from linearize.mixers.base import HeadShape, branch_off
from linearize.mixers.linearized_llm import LinearizedLlm, LinearizedLlmConfig
from linearize.testing.calls import HEADS, KV_HEADS, inputs, rotate, run, run_pieces

SCALE = 0.4  # of the scores, as `Case.mixer` has it
GROUP = HEADS // KV_HEADS


def seen_by_still(q: torch.Tensor, k: torch.Tensor, window: int, bank: int) -> list[list[int]]:
    """For each query the tokens that it sees by softmax, for one head's q and k [T, K] with their positions."""
    T = len(q)
    saliency = torch.zeros(T, dtype=torch.float64)
    for t in range(T):
        last = range(max(0, t - window + 1), t + 1)
        saliency[last] += torch.softmax(SCALE * (k[last] @ q[t]), 0)
    rounded = saliency.float().tolist()  # as documented: equal but for rounding is equal
    seen = []
    for t in range(T):
        local = max(0, t // window - 1) * window
        salient = sorted(range(local), key=lambda i: (-rounded[i], i))[:bank]
        seen.append([*sorted(salient), *range(local, t + 1)])
    return seen


def seen_in_groups(q: torch.Tensor, k: torch.Tensor, window: int) -> list[list[int]]:
    return [list(range(t // window * window, t + 1)) for t in range(len(q))]


def norm_preserving(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    f = x @ weight
    u = f * x.norm(dim=-1, keepdim=True) / f.norm(dim=-1, keepdim=True)
    return torch.cat([torch.softmax(u, -1), torch.softmax(-u, -1)], dim=-1)


def hedgehog(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.softmax(x @ weight, -1), torch.softmax(-(x @ weight), -1)], dim=-1)


def by_hand(mixer, given, seen_of, phi, off: str = "") -> torch.Tensor:
    """y [1, T, Hq, V] from which tokens each query sees, shared denominator and feature map."""
    q, k, v = given[0][0], given[1][0], given[2][0]
    positions = torch.arange(len(q))[None]
    rope = mixer.config.rope
    turned = (q, k) if rope == "none" else (rotate(q[None], positions)[0], rotate(k[None], positions)[0])
    linear = (q, k) if rope == "window" else turned
    y = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float64)
    for h in range(HEADS):
        soft_q, soft_k, values = turned[0][:, h], turned[1][:, h // GROUP], v[:, h // GROUP]
        phi_q, phi_k = phi(mixer.map_q.weight[h], linear[0][:, h]), phi(mixer.map_k.weight[h], linear[1][:, h // GROUP])
        factor = torch.sigmoid(mixer.combine.window_factor[h])
        for t, exact in enumerate(seen_of(soft_q, soft_k)):
            others = [i for i in range(t) if i not in exact]
            scores = SCALE * (soft_k[exact] @ soft_q[t])
            weights = factor * (scores - scores.max()).exp()
            features = phi_k[others] @ phi_q[t]
            if off == "linear":
                features = 0 * features
            if off == "window":  # what `normalized` adds keeps 0 / 0 finite
                y[t, h] = features @ values[others] / (features.sum() + 1e-6)
                continue
            y[t, h] = (weights @ values[exact] + features @ values[others]) / (weights.sum() + features.sum())
    return y[None]


def convolved(mixer, v: torch.Tensor) -> torch.Tensor:
    """[1, T, Hq, V]: each key head's own filter over v [1, T, Hkv, V], the last tap for the current token."""
    out = torch.zeros(*v.shape[:2], HEADS, v.shape[-1], dtype=torch.float64)
    size = mixer.taps.shape[-1]
    for h in range(HEADS):
        for t in range(v.shape[1]):
            for j in range(min(size, t + 1)):
                out[0, t, h] += mixer.taps[h // GROUP, 0, size - 1 - j] * v[0, t - j, h // GROUP]
    return out


def exact(case: Case, T: int) -> tuple:
    """The mixer and its inputs in float64, and its output in both precisions."""
    mixer, given = case.mixer(torch.float64), [x.double() for x in inputs(1, T)]
    return mixer, given, (run(mixer, given)[0], run(case.mixer(), inputs(1, T))[0])


def check(results: tuple[torch.Tensor, torch.Tensor], expected: torch.Tensor) -> None:
    assert results[0].dtype == torch.float64 and results[1].dtype == torch.float32
    assert_close([results[0]], [expected], 1e-9)
    assert_close([results[1]], [expected], 1e-5)


@pytest.mark.parametrize(
    ("T", "settings"),
    [
        (1, {}),
        (300, {}),
        (100, {"window": 8, "bank": 5}),
        (97, {"window": 8, "bank": 0}),
        (100, {"window": 8, "bank": 200}),
        (60, {"window": 4, "bank": 9, "rope": "window"}),
        (60, {"window": 5, "bank": 3, "rope": "none"}),
        (20, {"window": 1, "bank": 2}),
    ],
    ids=str,
)
@torch.no_grad()
def test_still(T: int, settings: dict):
    mixer, given, results = exact(Case("still", settings), T)

    def seen(q: torch.Tensor, k: torch.Tensor) -> list[list[int]]:
        return seen_by_still(q, k, settings.get("window", 64), settings.get("bank", 64))

    check(results, by_hand(mixer, given, seen, norm_preserving))
    for branch in mixer.branches:
        with branch_off(mixer, branch):
            assert_close([run(mixer, given)[0]], [by_hand(mixer, given, seen, norm_preserving, off=branch)], 1e-9)


@torch.no_grad()
def test_heads_that_share_keys_may_keep_different_tokens():
    _, given, _ = exact(Case("still", {}), 100)
    chosen = [seen_by_still(given[0][0, :, h], given[1][0, :, 0], 8, 5)[-1] for h in range(GROUP)]
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_still_keeps_the_same_tokens_in_pieces(dtype: torch.dtype):
    mixer = Case("still", {"window": 8, "bank": 12}).mixer(dtype)
    given = [x.to(dtype) for x in inputs(2, 1000)]
    whole, whole_state = run(mixer, given)
    for lengths in ([1] * 1000, random_splits(1000, 0), random_splits(1000, 1)):
        y, state = run_pieces(mixer, given, lengths)
        # Bit for bit: the bank holds copies of keys and values, so any other choice would show.
        assert torch.equal(state["bank"], whole_state["bank"]) and torch.equal(state["score"], whole_state["score"])
        assert_close([y], [whole], 1e-5)
        assert_same_state(state, whole_state, 1e-5)


@torch.no_grad()
def test_still_breaks_ties_by_position():
    mixer = Case("still", {"window": 4, "bank": 6, "rope": "none"}).mixer(torch.float64)
    q, k, v, x = (x.double() for x in inputs(1, 60))
    given = [q[:, :1].expand_as(q), k[:, :1].expand_as(k), v, x]
    y, state = run(mixer, given)
    assert_close([y], [by_hand(mixer, given, lambda q, k: seen_by_still(q, k, 4, 6), norm_preserving)], 1e-9)
    assert torch.equal(state["bank"][0, :, 0, -v.shape[-1] :], v[0, :6, 0])
    for lengths in ([1] * 60, random_splits(60, 0)):
        assert torch.equal(run_pieces(mixer, given, lengths)[1]["bank"], state["bank"])


@pytest.mark.parametrize(
    ("T", "settings"),
    [
        (1, {}),
        (150, {}),
        (100, {"window": 8}),
        (50, {"window": 8, "conv_size": 1, "rope": "window"}),
        (50, {"window": 5, "conv_size": 0, "rope": "none"}),
        (10, {"window": 1}),
    ],
    ids=str,
)
@torch.no_grad()
def test_linearized_llm(T: int, settings: dict):
    mixer, given, results = exact(Case("linearized_llm", settings), T)

    def seen(q: torch.Tensor, k: torch.Tensor) -> list[list[int]]:
        return seen_in_groups(q, k, settings.get("window", 64))

    near = convolved(mixer, given[2]) if mixer.config.conv_size else 0
    check(results, by_hand(mixer, given, seen, hedgehog) + near)
    for branch in mixer.branches:
        with branch_off(mixer, branch):
            assert_close([run(mixer, given)[0]], [by_hand(mixer, given, seen, hedgehog, off=branch) + near], 1e-9)


@torch.no_grad()
def test_the_convolution_changes_nothing_at_first():
    shape, given = HeadShape(HEADS, KV_HEADS, 8, 6, 12, scale=SCALE), inputs(2, 100)
    outputs = []
    for size in (32, 0):
        mixer = LinearizedLlm(LinearizedLlmConfig(conv_size=size), shape)
        mixer.initialise("mixer", seed=0)
        outputs.append(run(mixer, given)[0])
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("key", "settings"), [("still", {"bank": 5}), ("linearized_llm", {"conv_size": 0})])
@torch.no_grad()
def test_branches_can_be_added(key: str, settings: dict):
    mixer, given = Case(key, {"window": 8, "combine": {"type": "sum"}, **settings}).mixer(), inputs(2, 100)
    y = run(mixer, given)[0]
    with branch_off(mixer, "linear"):
        window = run(mixer, given)[0]
    with branch_off(mixer, "window"):
        memory = run(mixer, given)[0]
    assert_close([y], [window + memory], 1e-6)
    assert_close([run_pieces(mixer, given, random_splits(100, 0))[0]], [y], 1e-5)


@pytest.mark.parametrize("mixer", ["still", "linearized_llm"])
@torch.no_grad()
def test_weights_can_be_read_with_one_hot_values(mixer: str):
    T = 40
    case = Case(mixer, {"window": 8, **({"bank": 5} if mixer == "still" else {})})
    found, (q, k, v, x) = case.mixer(torch.float64), [x.double() for x in inputs(1, T)]
    assert found.linear_in_values
    pieces = torch.eye(T, dtype=torch.float64)[None, :, None].expand(-1, -1, KV_HEADS, -1).split(v.shape[-1], dim=-1)
    read = [run(found, [q, k, torch.nn.functional.pad(p, (0, v.shape[-1] - p.shape[-1])), x])[0] for p in pieces]
    weights = torch.cat(read, dim=-1)[..., :T]  # [1, T, Hq, T]
    expected = torch.einsum("bths,bshv->bthv", weights, v.repeat_interleave(GROUP, dim=2))
    assert_close([expected], [run(found, [q, k, v, x])[0]], 1e-9)


@pytest.mark.parametrize(
    ("key", "settings", "message"),
    [
        ("still", {"window": 0}, "window must be at least 1 token, got 0"),
        ("still", {"bank": -1}, "bank must be 0 or more tokens, got -1"),
        ("linearized_llm", {"conv_size": -2}, "conv_size must lie between 0 and 128 tokens, got -2"),
        ("still", {"feature_map": "identity"}, "feature_map 'identity' does not give; take a map such as hedgehog"),
    ],
)
def test_impossible_settings_are_refused(key: str, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Case(key, settings).mixer()
