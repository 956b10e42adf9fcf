"""Each mixer against its published formula, written out query by query in float64."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from mixer_cases import Case
from ops.op_cases import assert_close

from linearize.mixers.base import branch_off
from linearize.testing.calls import HEADS, KV_HEADS, inputs, rotate, run

SCALE = 0.4  # of the scores, as `Case.mixer` has it


def float64_case(key: str, T: int, **settings) -> tuple:
    """The mixer in float64 and fp32, its inputs, and per query head q, k [H, T, K] bare and rotated, v [H, T, V]."""
    case = Case(key, settings)
    mixer, given = case.mixer(torch.float64), [x.double() for x in inputs(1, T)]
    q, k, v, _ = given
    positions = torch.arange(T)[None]
    serving = [h // (HEADS // KV_HEADS) for h in range(HEADS)]
    bare = [q[0].transpose(0, 1), k[0, :, serving].transpose(0, 1)]
    rotated = [rotate(q, positions)[0].transpose(0, 1), rotate(k, positions)[0, :, serving].transpose(0, 1)]
    y, _ = run(mixer, given)
    single, _ = run(case.mixer(), inputs(1, T))
    return mixer, given, (y, single), bare, rotated, v[0, :, serving].transpose(0, 1)


def check(results: tuple[torch.Tensor, torch.Tensor], expected: list[list[torch.Tensor]]) -> None:
    """`expected` holds y_t [V] per head and token; the mixer gives [1, T, H, V] in float64 and in float32."""
    y = torch.stack([torch.stack(head) for head in expected], dim=1)[None]
    assert results[0].dtype == torch.float64 and results[1].dtype == torch.float32
    assert_close([results[0]], [y], 1e-9)
    assert_close([results[1]], [y], 1e-5)


def hedgehog_map(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[softmax(xW), softmax(-xW)] for x [..., K] and one head's W [K, F / 2]."""
    return torch.cat([torch.softmax(x @ weight, -1), torch.softmax(-(x @ weight), -1)], dim=-1)


def lolcats_by_hand(mixer, window_qk, linear_qk, v, window: int, sinks: int) -> list[list[torch.Tensor]]:
    outputs: list[list[torch.Tensor]] = []
    for h in range(HEADS):
        gamma = 1 / (1 + math.exp(-float(mixer.combine.window_factor[h])))
        q, k = window_qk[0][h], window_qk[1][h]
        phi_q = hedgehog_map(mixer.map_q.weight[h], linear_qk[0][h])
        phi_k = hedgehog_map(mixer.map_k.weight[h], linear_qk[1][h])
        outputs.append([])
        for t in range(len(q)):
            near = [i for i in range(t + 1) if t - i < window or i < sinks]
            far = [i for i in range(t + 1) if i not in near]
            scores = SCALE * (k[near] @ q[t])
            weights = gamma * (scores - scores.max()).exp()
            features = phi_k[far] @ phi_q[t]
            numerator = weights @ v[h][near] + features @ v[h][far]
            outputs[h].append(numerator / (weights.sum() + features.sum()))
    return outputs


@pytest.mark.parametrize(
    ("T", "settings"),
    [
        (64, {}),
        (65, {}),
        (150, {}),
        (150, {"feature_map": {"dim": 5}}),
        (150, {"sinks": 4}),
        (150, {"rope": "window"}),
        (40, {"window": 1, "sinks": 2, "rope": "window"}),
    ],
    ids=str,
)
@torch.no_grad()
def test_lolcats(T: int, settings: dict):
    mixer, _, results, bare, rotated, v = float64_case("lolcats", T, **settings)
    linear = bare if settings.get("rope") == "window" else rotated
    check(results, lolcats_by_hand(mixer, rotated, linear, v, settings.get("window", 64), settings.get("sinks", 0)))


@torch.no_grad()
def test_lolcats_starts_as_the_paper_does():
    mixer = Case("lolcats", {}).mixer()
    mixer.initialise("mixer", seed=0)
    assert torch.allclose(mixer.combine.window_factor.sigmoid(), torch.tensor(0.1))
    for weight in (mixer.map_q.weight, mixer.map_k.weight):
        assert torch.equal(weight, torch.eye(8).expand(HEADS, 8, 8))


@torch.no_grad()
def test_lolcats_branches_alone():
    T, window = 150, 64
    mixer, given, _, _, rotated, v = float64_case("lolcats", T)
    with branch_off(mixer, "linear"):
        local, _ = run(mixer, given)
    with branch_off(mixer, "window"):
        linear, _ = run(mixer, given)
    assert not linear[:, :window].any()
    t, h = 149, 3
    near, far = list(range(t - window + 1, t + 1)), list(range(t - window + 1))
    weights = torch.softmax(SCALE * (rotated[1][h][near] @ rotated[0][h][t]), 0)
    features = hedgehog_map(mixer.map_k.weight[h], rotated[1][h][far]) @ hedgehog_map(
        mixer.map_q.weight[h], rotated[0][h][t]
    )
    assert_close([local[0, t, h]], [weights @ v[h][near]], 1e-9)
    assert_close([linear[0, t, h]], [features @ v[h][far] / features.sum()], 1e-6)


@pytest.mark.parametrize("T", [1, 150])
@torch.no_grad()
def test_hedgehog(T: int):
    mixer, _, results, _, (q, k), v = float64_case("hedgehog", T)
    expected: list[list[torch.Tensor]] = []
    for h in range(HEADS):
        phi_q, phi_k = hedgehog_map(mixer.map_q.weight[h], q[h]), hedgehog_map(mixer.map_k.weight[h], k[h])
        weights = [phi_k[: t + 1] @ phi_q[t] for t in range(T)]
        # The denominator is kept from zero by 1e-6.
        expected.append([w @ v[h][: t + 1] / (w.sum() + 1e-6) for t, w in enumerate(weights)])
    check(results, expected)


def fla_naive_gla():
    """The reference recurrence of the installed fla, loaded by path: importing the fla package needs triton."""
    spec = importlib.util.find_spec("fla")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "ops" / "gla" / "naive.py"
    reference = importlib.util.spec_from_file_location("fla_gla_naive", path)
    assert reference is not None and reference.loader is not None
    module = importlib.util.module_from_spec(reference)
    reference.loader.exec_module(module)
    return module.naive_recurrent_gla


@pytest.mark.parametrize(
    ("T", "settings"),
    [
        (64, {}),
        (65, {}),
        (150, {}),
        (150, {"sinks": 4, "combine": {"mix": 0.2}}),
        (40, {"window": 3, "decay": {"normalizer": 2.0}}),
    ],
    ids=str,
)
@torch.no_grad()
def test_liger(T: int, settings: dict):
    mixer, given, results, (bare_q, bare_k), (q, k), v = float64_case("liger", T, **settings)
    mix = settings.get("combine", {}).get("mix", 0.5)
    normalizer = settings.get("decay", {}).get("normalizer", 16.0)
    recurrent: list[list[torch.Tensor]] = []
    expected: list[list[torch.Tensor]] = []
    for h in range(HEADS):
        S = torch.zeros(8, 6, dtype=torch.float64)
        recurrent.append([])
        expected.append([])
        for t in range(T):
            decay = torch.sigmoid(bare_k[h][t]) ** (1 / normalizer)
            S = decay[:, None] * S + torch.outer(torch.softmax(bare_k[h][t], 0), v[h][t])
            recurrent[h].append(torch.softmax(bare_q[h][t], 0) @ S)
            near = [i for i in range(t + 1) if t - i < mixer.config.window or i < mixer.config.sinks]
            local = torch.softmax(SCALE * (k[h][near] @ q[h][t]), 0) @ v[h][near]
            expected[h].append((1 - mix) * recurrent[h][t] + mix * local)
    check(results, expected)

    with branch_off(mixer, "window"):
        alone, _ = run(mixer, given)
    rows = [x.transpose(0, 1)[None].float() for x in (bare_q, bare_k, v)]
    gates = torch.nn.functional.logsigmoid(rows[1]) / normalizer
    # fla multiplies q by K ** -0.5 inside.
    independent, _ = fla_naive_gla()(rows[0].softmax(-1) * math.sqrt(8), rows[1].softmax(-1), rows[2], gates)
    assert_close([alone], [independent], 1e-5)
