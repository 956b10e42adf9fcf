"""Gated slot attention against fla's loop, with slots that are neither as many as key nor as value channels."""

import pytest
import torch
from op_cases import as_leaves, assert_close, document_rows, fla_reference, gradients, relative_error

from linearize.ops.gsa import gsa, slot_logits, sums_behind

SLOTS = 5


def inputs_of(B: int, T: int, strongest: float = -0.2, groups: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(0)
    g = -0.1 * torch.rand(B, T, 2, SLOTS)
    g = torch.where(torch.rand_like(g) < 0.1, strongest, g)
    return [torch.randn(B, T, 2 * groups, 8), torch.randn(B, T, 2, 8), torch.randn(B, T, 2, 6), g, 1 - g.exp()]


@pytest.mark.parametrize("strongest", [-0.2, -20.0])
def test_agrees_with_fla_reference(strongest: float):
    inputs = inputs_of(2, 70, strongest)
    start = [0.3 * torch.randn(2, 2, 8, SLOTS), 0.3 * torch.randn(2, 2, SLOTS, 6)]
    ours, theirs = (as_leaves([*inputs, *start], torch.float32) for _ in range(2))
    y, state = gsa(*ours[:5], state=tuple(ours[5:]), chunk_size=16)
    q, k, v, g, s, *start = theirs
    expected, S = fla_reference("gsa", "naive_recurrent_gsa")(q, k, v, s, g, None, start, True)
    assert_close([y, *state], [expected, *S], 1e-5)
    assert_close(gradients([y, *state], ours), gradients([expected, *S], theirs), 1e-4)


def test_grouped_heads_agree_with_fla_reference():
    q, k, v, g, s = inputs_of(1, 33, groups=3)
    expected, _ = fla_reference("gsa", "naive_recurrent_gsa")(q, k, v, s, g)
    assert_close([gsa(q, k, v, g, s)[0]], [expected], 1e-5)


@pytest.mark.parametrize("strongest", [-0.2, -20.0, float("-inf")])
def test_chunks_equal_float64_loop(strongest: float):
    inputs = inputs_of(2, 150, strongest)
    inputs[4] = torch.rand_like(inputs[4])
    leaves, exact = as_leaves(inputs, torch.float32), as_leaves(inputs, torch.float64)
    y, state = gsa(*leaves)
    expected, S = gsa(*exact, backend="naive")
    assert_close([y, *state], [expected, *S], 1e-5)
    grads = gradients([y, *state], leaves)
    assert all(x.isfinite().all() for x in grads)
    assert_close(grads, gradients([expected, *S], exact), 1e-4)


def test_documents_equal_each_document_alone():
    inputs = inputs_of(1, 50)
    y, state = gsa(*inputs, documents=document_rows([[20, 1, 29]]), chunk_size=16)
    parts = [gsa(*(x[:, a:b] for x in inputs)) for a, b in ((0, 20), (20, 21), (21, 50))]
    assert_close([y, *state], [torch.cat([part[0] for part in parts], dim=1), *parts[-1][1]], 1e-5)


def test_logits_keep_small_decays_beside_large_ones():
    g = torch.tensor([-20.0] * 32 + [-1e-3] * 32)[:, None]
    k, s = torch.zeros(64, 1), torch.ones(64, 1)
    k[35] = 1.0
    logits = slot_logits(torch.ones(64, 1), k, g, s)
    assert not logits[:35].any()
    assert_close([logits[40, 0]], [torch.tensor(-5e-3, dtype=torch.float64).exp()], 1e-7)
    assert sums_behind(g)[63, 0] == 0 and relative_error(sums_behind(g)[31], torch.tensor([-0.032])) < 1e-6


def test_slots_that_do_not_fit_are_refused():
    q, k, v, g, s = inputs_of(1, 4)
    with pytest.raises(ValueError, match=r"gsa: g and s must both be \[B, T, H, M\], got \(1, 4, 2, 5\) and"):
        gsa(q, k, v, g, s[..., :4])
