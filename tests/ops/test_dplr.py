"""The generalised delta rule against fla's loop and its definition by matrices, and what a reset hides from `a`."""

import pytest
import torch
from op_cases import Case, as_leaves, assert_close, case_of, fla_reference, gradients

from linearize.ops.dplr import DPLR, dplr


@pytest.fixture
def case() -> Case:
    return case_of("dplr")


def test_agrees_with_fla_reference(case: Case):
    inputs = case.inputs(2, 70)
    _, start = case.run(case.inputs(2, 5, seed=2))
    ours, theirs = (as_leaves([*inputs, *start], torch.float32) for _ in range(2))
    outputs, state = case.run(ours[:-1], state=ours[-1:])
    q, k, v, g, a, b = (x.transpose(1, 2) for x in theirs[:-1])
    expected, S = fla_reference("generalized_delta_rule/dplr", "dplr_recurrence")(q, k, v, a, b, g, theirs[-1])
    expected = [expected.transpose(1, 2), S]
    assert_close([*outputs, *state], expected, 1e-5)
    assert_close(gradients([*outputs, *state], ours), gradients(expected, theirs), 1e-4)


@pytest.mark.parametrize("chunk_size", [1, 2, 8, 64])
def test_state_is_a_product_of_diagonal_plus_low_rank_matrices(case: Case, chunk_size: int):
    inputs = [x.double() for x in case.inputs(1, 19, H=1)]
    outputs, state = case.run(inputs, chunk_size=chunk_size)
    S, expected = torch.zeros(8, 6, dtype=torch.float64), []
    for q, k, v, g, a, b in zip(*(x[0, :, 0] for x in inputs), strict=True):
        S = (torch.diag(g.exp()) + torch.outer(b, a)) @ S + torch.outer(k, v)
        expected.append(q @ S * 8**-0.5)
    assert_close([outputs[0][0, :, 0], state[0][0, 0]], [torch.stack(expected), S], 1e-12)


@pytest.mark.parametrize("first", [1, 15, 16, 17])
def test_reset_hides_the_past_from_what_is_read(case: Case, first: int):
    inputs = case.inputs(1, 40)
    inputs[3][:, first] = float("-inf")
    for backend in ("torch", "naive"):
        outputs, state = case.run(inputs, chunk_size=16, backend=backend)
        alone, alone_state = case.run([x[:, first:] for x in inputs], backend="naive")
        assert_close([outputs[0][:, first:], *state], [*alone, *alone_state], 1e-5)


def test_channels_reset_one_by_one_have_finite_and_right_gradients(case: Case):
    inputs = case.inputs(2, 100)
    inputs[3] = inputs[3].masked_fill(torch.rand_like(inputs[3]) < 0.1, float("-inf"))
    leaves, exact = as_leaves(inputs, torch.float32), as_leaves(inputs, torch.float64)
    outputs, state = case.run(leaves, chunk_size=32)
    expected, expected_state = case.run(exact, backend="naive")
    assert_close([*outputs, *state], [*expected, *expected_state], 1e-5)
    grads = gradients([*outputs, *state], leaves)
    assert all(x.isfinite().all() for x in grads)
    assert_close(grads, gradients([*expected, *expected_state], exact), 1e-4)


def test_reduces_to_the_gated_delta_rule(case: Case):
    """a = -beta exp(g) k, b = k is KDA: the delta is taken after the decay."""
    kda = case_of("kda")
    q, k, v, g, beta = (x.double() for x in kda.inputs(2, 50))
    expected, S = kda.run([q, k, v, g, beta])
    y, state = dplr(q, k * beta.unsqueeze(-1), v, g, -g.exp() * k * beta.unsqueeze(-1), k)
    assert_close([y, state], [*expected, *S], 1e-12)


def test_impossible_heads_are_refused(case: Case):
    q, k, v, g, a, b = case.inputs(1, 4)
    with pytest.raises(ValueError, match=r"dplr: b must be \[B, T, H, K\], got \(1, 4, 2, 7\)"):
        dplr(q, k, v, g, a, b[..., :7])
    assert DPLR.obstacle is not None
    wide = torch.zeros(1, 1, 1, 320)
    assert not DPLR.obstacle(q, k, v, g, a, b)
    assert "256 key channels, these have 320" in DPLR.obstacle(wide, wide, wide, wide, wide, wide)
