"""Packed documents in rows of their own and back."""

import pytest
import torch
from op_cases import document_rows
from torch.fx.experimental.proxy_tensor import make_fx

from linearize.ops.documents import cumulative_lengths, positions, repack, unpack

ROWS = [
    [[1]],
    [[5]],
    [[1, 1, 1, 1]],
    [[8, 8], [16], [1, 15]],
    [[3, 1, 9, 2], [15], [7, 8]],
    [[1, 1, 62, 64], [128], [100, 28], [64, 64]],
]
packings = pytest.mark.parametrize("rows", ROWS, ids=str)


def running_sums(x: torch.Tensor, gate: torch.Tensor | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A form whose outputs need the whole document, and a state that counts the gate."""
    sums = x.cumsum(1)
    return sums, {"sum": sums[:, -1], "count": torch.ones_like(x[..., 0]).sum(1) if gate is None else gate.sum(1)}


def run(x: torch.Tensor, gate: torch.Tensor | None, documents: torch.Tensor) -> tuple[torch.Tensor, dict]:
    unpacked, layout = unpack([x, gate], documents)
    return repack([running_sums(*row) for row in unpacked], layout)


@packings
def test_each_document_runs_alone_and_comes_back_in_place(rows: list[list[int]]):
    B, T = len(rows), sum(rows[0])
    x = torch.randn(B, T, 3, dtype=torch.float64, requires_grad=True)
    gate = torch.randint(1, 9, (B, T))
    out, state = run(x, gate, document_rows(rows))
    weight, expected = torch.randn_like(out), torch.zeros(())
    for row, lengths in enumerate(rows):
        pieces = x[row].split(lengths)
        sums = torch.cat([piece.cumsum(0) for piece in pieces])
        torch.testing.assert_close(out[row], sums)
        torch.testing.assert_close(state["sum"][row], pieces[-1].sum(0))
        assert state["count"][row] == gate[row, T - lengths[-1] :].sum()
        expected = expected + (weight[row] * sums).sum()
    (grad,) = torch.autograd.grad((out * weight).sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x)[0])


@packings
def test_at_most_half_of_what_is_computed_is_padding(rows: list[list[int]]):
    B, T = len(rows), sum(rows[0])
    unpacked, layout = unpack([torch.ones(B, T, 1)], document_rows(rows))
    assert sum(row[0].sum() for row in unpacked) == B * T
    assert all(2 * x.sum(1).min() > x.shape[1] for x in layout.real)


def test_padding_is_neutral_for_each_input_and_absent_gates_stay_absent():
    x, gate = torch.full((1, 7, 2), 7.0), torch.full((1, 7), 5.0)
    (row,), _ = unpack([x, x, x, gate, None, gate], document_rows([[3, 4]]), (0.0, 0.0, -2.0))
    q, k, v, g, absent, beta = row
    assert absent is None
    assert all(padded[0, 3].tolist() == [0.0, 0.0] for padded in (q, k, v))
    assert (g[0, 3], beta[0, 3]) == (0.0, -2.0) and (g[1] == 5.0).all() and (beta[1] == 5.0).all()


@pytest.mark.parametrize("function", [positions, cumulative_lengths])
def test_documents_are_read_once_for_all_layers_and_again_where_they_change(function):
    documents = document_rows([[2, 3, 1]])
    first = function(documents)
    assert function(documents) is first
    documents[:] = document_rows([[1, 5]])
    for changed in (function(documents), function(document_rows([[1, 5]]))):
        assert all(a.tolist() == b.tolist() for a, b in zip(changed, function(document_rows([[1, 5]])), strict=True))
    assert function(documents)[0].tolist() != first[0].tolist()


def test_a_recorded_program_reads_the_documents_that_it_is_given():
    """make_fx records operations, and what was remembered of the tensor it is shown has none."""
    shown, other = document_rows([[2, 3, 1]]), document_rows([[1, 4, 1]])
    positions(shown)
    recorded = make_fx(positions, tracing_mode="real")(shown)
    assert [x.tolist() for x in recorded(other)] == [x.tolist() for x in positions(other)]


@pytest.mark.parametrize("function", [positions, cumulative_lengths])
def test_what_was_read_in_inference_mode_is_not_kept(function):
    documents = document_rows([[2, 3, 1]])
    with torch.inference_mode():
        assert function(documents)[0].is_inference()
    assert not function(documents)[0].is_inference()
