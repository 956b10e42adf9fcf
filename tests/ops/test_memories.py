"""Mixtures of memories against a loop over memories that gives each one only its own tokens."""

import pytest
import torch
from op_cases import Case, as_leaves, assert_close, case_of, document_rows, gradients, right_padding

from linearize.ops.memories import memories
from linearize.ops.simple_gla import simple_gla

NAMES = ["simple_gla", "gla", "gated_delta", "kda", "delta_product", "dplr", "gsa", "mlstm"]
every_op = pytest.mark.parametrize("case", [case_of(name) for name in NAMES], ids=NAMES)
M = 4


def neutral_of(case: Case) -> tuple[float, ...]:
    return (0.0, float("-inf")) if case.name == "mlstm" else ()


def routing(B: int, T: int, chosen: int = 2) -> torch.Tensor:
    """`[B, T, M]`: the weights of the strongest memories, zeros for the others."""
    weights = torch.randn(B, T, M, generator=torch.Generator().manual_seed(3)).softmax(-1)
    kept = weights.topk(chosen, dim=-1)
    return torch.zeros_like(weights).scatter(-1, kept.indices, kept.values)


def run(case: Case, inputs: list[torch.Tensor], route: torch.Tensor, **options):
    q, k, v, *gates = inputs
    y, state = memories(case.op, q, k, v, gates, route, neutral=neutral_of(case), **options)
    return y, list(state) if isinstance(state, tuple) else [state]


def by_loop(case: Case, inputs: list[torch.Tensor], route: torch.Tensor, documents: torch.Tensor | None = None):
    """Each row and memory alone, on the routed tokens only; (outputs, states by memory with the others' heads)."""
    y, states = torch.zeros(*inputs[0].shape[:3], inputs[2].shape[-1], dtype=inputs[2].dtype), []
    for row in range(route.shape[0]):
        rows = []
        for m in range(route.shape[2]):
            own = route[row, :, m].nonzero().flatten()
            options = {} if documents is None else {"documents": documents[row : row + 1, own]}
            (out,), state = case.run([x[row : row + 1, own] for x in inputs], **options)
            weighted = route[row, own, m, None, None] * out[0]
            y = y.index_put((torch.tensor(row), own), weighted, accumulate=True)
            rows.append(state)
        states.append([torch.cat(parts, dim=1) for parts in zip(*rows, strict=True)])
    return y, [torch.cat(parts) for parts in zip(*states, strict=True)]


@every_op
def test_each_memory_sees_only_its_own_tokens(case: Case):
    """Values, states and gradients, with grouped heads; route's gradients where a token was routed."""
    inputs, route = case.inputs(2, 50, groups=2), routing(2, 50)
    ours, exact = as_leaves([*inputs, route], torch.float32), as_leaves([*inputs, route], torch.float64)
    y, state = run(case, ours[:-1], ours[-1])
    expected, expected_state = by_loop(case, exact[:-1], exact[-1])
    assert_close([y, *state], [expected, *expected_state], 1e-5)
    grads, truths = gradients([y, *state], ours), gradients([expected, *expected_state], exact)
    assert all(x.isfinite().all() for x in grads)
    grads[-1] = torch.where(route != 0, grads[-1], 0)
    assert_close(grads, truths, 1e-4)


@every_op
def test_pieces_steps_and_padding_equal_one_call(case: Case):
    inputs, route = case.inputs(2, 30), routing(2, 30)
    whole, whole_state = run(case, inputs, route)
    mask = right_padding([20, 13], 20)
    y, state = run(case, [x[:, :20] for x in inputs], route[:, :20], mask=mask)
    assert_close([y[0], y[1, :13]], [whole[0, :20], whole[1, :13]], 1e-5)
    second = [torch.stack([x[0, 20:27], x[1, 13:20]]) for x in (*inputs, route)]
    packed = state[0] if len(state) == 1 else tuple(state)
    pieces = []
    for t in range(7):
        part = [x[:, t : t + 1] for x in second]
        out, state = run(case, part[:-1], part[-1], state=packed)
        packed = state[0] if len(state) == 1 else tuple(state)
        pieces.append(out)
    steps = torch.cat(pieces, dim=1)
    assert_close([steps[0], steps[1]], [whole[0, 20:27], whole[1, 13:20]], 1e-5)
    assert [x.shape for x in state] == [x.shape for x in whole_state]


@every_op
def test_documents_forget_in_every_memory(case: Case):
    """Two documents, long enough for each of them to reach every memory."""
    inputs, route, documents = case.inputs(2, 60), routing(2, 60), document_rows([[25, 35], [40, 20]])
    y, state = run(case, inputs, route, documents=documents, chunk_size=16)
    expected, expected_state = by_loop(case, inputs, route, documents)
    assert_close([y, *state], [expected, *expected_state], 1e-5)


def test_a_shared_memory_is_one_that_every_token_activates():
    case = case_of("gla")
    inputs, route = case.inputs(2, 40), routing(2, 40)
    y, state = run(case, inputs, route, shared=True)
    expected, expected_state = by_loop(case, inputs, torch.cat([route, torch.ones(2, 40, 1)], dim=-1))
    assert_close([y, *state], [expected, *expected_state], 1e-5)


def test_memories_may_have_keys_values_and_gates_of_their_own():
    case, route = case_of("gated_delta"), routing(2, 40)
    q, _, _, *_ = case.inputs(2, 40, groups=2)
    own = [case.inputs(2, 40, seed=seed)[1:] for seed in range(M)]
    k, v, *gates = (torch.stack(parts, dim=2) for parts in zip(*own, strict=True))
    y, state = memories(case.op, q, k, v, gates, route, own=True)
    alone = [by_loop(case, [q, *own[m]], route[..., m : m + 1]) for m in range(M)]
    assert_close([y, state], [sum(x for x, _ in alone), torch.cat([x[0] for _, x in alone], dim=1)], 1e-5)


def test_one_memory_with_weight_one_is_the_operator_itself():
    q, k, v, g = case_of("simple_gla").inputs(2, 40, groups=2)
    y, state = memories(simple_gla, q, k, v, [g], torch.ones(2, 40, 1))
    assert all(torch.equal(a, b) for a, b in zip((y, state), simple_gla(q, k, v, g), strict=True))


def test_an_absent_decay_stays_absent():
    q, k, v, _ = case_of("simple_gla").inputs(1, 20)
    route = routing(1, 20)
    y, _ = memories(simple_gla, q, k, v, [None], route)
    assert_close([y], [memories(simple_gla, q, k, v, [torch.zeros(1, 20, 2)], route)[0]], 1e-6)


def test_impossible_routes_are_refused():
    q, k, v, g = case_of("simple_gla").inputs(1, 20)
    with pytest.raises(ValueError, match=r"route must be \[B, T, M\], got \(1, 19, 4\)"):
        memories(simple_gla, q, k, v, [g], routing(1, 19))
    with pytest.raises(ValueError, match=r"k, v and gates must be \[B, T, 4, H, ...\], got k \(1, 20, 2, 8\)"):
        memories(simple_gla, q, k, v, [g], routing(1, 20), own=True)
