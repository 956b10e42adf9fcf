"""Log-linear attention against the sum over tokens written out, fla's mask construction, and its special cases."""

import pytest
import torch
import torch.nn.functional as F
from op_cases import as_leaves, assert_close, case_of, document_rows, fla_reference, gradients, right_padding

from linearize.ops.delta import delta_rule
from linearize.ops.layout import expand_heads
from linearize.ops.log_linear import fenwick_level, later_levels, log_linear
from linearize.ops.simple_gla import simple_gla

both = pytest.mark.parametrize("delta", [False, True], ids=["simple_gla", "delta"])


def inputs_of(B: int, T: int, L: int, delta: bool, *, groups: int = 1, strongest: float = -0.2) -> list[torch.Tensor]:
    case = case_of("log_linear_delta" if delta else "log_linear")
    q, k, v, _, _, *beta = case.inputs(B, T, groups=groups)
    return [q, k, v, case.log_decay(B, T, 2, 8, strongest), torch.rand(B, T, 2, L), *beta]


def level(t: int, s: int, L: int) -> int:
    return min((t ^ s).bit_length(), L - 1)


def sum_over_tokens(q, k, v, g, levels, beta=None, *, scale: float) -> torch.Tensor:
    """y_t = scale * sum_s levels_t[level(t, s)] q_t (A_t ... A_{s+1}) write_s, every product of transitions formed."""
    K, L = k.shape[-1], levels.shape[-1]
    identity = torch.eye(K, dtype=k.dtype)
    outs = []
    for t in range(q.shape[1]):
        y, product = torch.zeros_like(v[:, 0]), identity.expand(*k.shape[:1], k.shape[2], K, K)
        for s in range(t, -1, -1):
            rate = torch.ones_like(g[:, s]) if beta is None else beta[:, s]
            write = torch.einsum("bh,bhk,bhv->bhkv", rate, k[:, s], v[:, s])
            read = torch.einsum("bhk,bhkj,bhjv->bhv", q[:, t], product, write)
            y = y + levels[:, t, :, level(t, s, L), None] * read
            A = identity if beta is None else identity - torch.einsum("bh,bhk,bhj->bhkj", rate, k[:, s], k[:, s])
            product = product @ (g[:, s].exp()[..., None, None] * A)
        outs.append(scale * y)
    return torch.stack(outs, dim=1)


@both
@pytest.mark.parametrize("L", [1, 2, 4, 8])
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_equals_the_sum_over_tokens(delta: bool, L: int, backend: str):
    inputs = inputs_of(2, 45, L, delta)
    ours, exact = as_leaves(inputs, torch.float32), as_leaves(inputs, torch.float64)
    y, _ = log_linear(*ours, scale=0.7, chunk_size=8, backend=backend)
    expected = sum_over_tokens(*exact, scale=0.7)
    assert_close([y], [expected], 1e-5)
    assert_close(gradients([y], ours), gradients([expected], exact), 1e-4)


@pytest.mark.parametrize("T", [1, 2, 64, 100])
def test_agrees_with_fla_reference(T: int):
    inputs = inputs_of(2, T, 8, delta=False)
    ours, theirs = (as_leaves(inputs, torch.float32) for _ in range(2))
    y, _ = log_linear(*ours, scale=0.5)
    q, k, v, g, levels = theirs
    expected = fla_reference("log_linear_attn", "naive_log_linear_attn")(q, k, v, g, levels, scale=0.5)
    assert_close([y], [expected], 1e-5)
    assert_close(gradients([y], ours), gradients([expected], theirs), 1e-4)


@both
@pytest.mark.parametrize("with_decay", [True, False], ids=["decay", "no-decay"])
def test_equal_weights_reduce_to_the_recurrence_below(delta: bool, with_decay: bool):
    q, k, v, g, levels, *beta = inputs_of(2, 150, 7, delta)
    g = g if with_decay else None
    below = delta_rule if delta else simple_gla
    y, (S, seen) = log_linear(q, k, v, g, torch.ones_like(levels), *beta)
    assert_close([y, S.sum(2)], list(below(q, k, v, g, *beta)), 1e-5)
    assert seen.tolist() == [150, 150]


@both
@pytest.mark.parametrize("chunk_size", [4, 32])
def test_rows_may_go_on_from_different_positions(delta: bool, chunk_size: int):
    """A batch of rows of 37, 5 and no tokens goes on, in values, states and gradients like each row in one piece."""
    lengths, T = [37, 5, 0], 40
    first, second = inputs_of(3, 37, 6, delta), [x.flip(1) for x in inputs_of(3, T, 6, delta)]
    ours, whole = (as_leaves([*first, *second], torch.float32) for _ in range(2))
    n = len(first)
    mask = right_padding(lengths, 37)
    earlier, state = log_linear(*ours[:n], mask=mask)
    assert state[1].tolist() == lengths
    y, after = log_linear(*ours[n:], state=state, chunk_size=chunk_size)
    expected, expected_earlier, S = [], [], []
    for row, length in enumerate(lengths):
        pieces = zip(whole[:n], whole[n:], strict=True)
        joined = [torch.cat([a[row : row + 1, :length], b[row : row + 1]], dim=1) for a, b in pieces]
        out, (S_row, seen) = log_linear(*joined, backend="naive")
        expected.append(out[:, length:])
        expected_earlier.append(F.pad(out[:, :length], (0, 0, 0, 0, 0, 37 - length)))
        S.append(S_row)
        assert seen.item() == after[1][row].item() == length + T
    results = [torch.where(mask[..., None, None], earlier, 0), y, after[0]]
    truths = [torch.cat(x) for x in (expected_earlier, expected, S)]
    assert_close(results, truths, 1e-5)
    assert_close(gradients(results, ours), gradients(truths, whole), 1e-4)


@both
def test_resets_by_the_decay_leave_nothing_and_no_nan(delta: bool):
    inputs = inputs_of(2, 90, 6, delta, strongest=float("-inf"))
    ours, exact = as_leaves(inputs, torch.float32), as_leaves(inputs, torch.float64)
    y, (S, _) = log_linear(*ours)
    expected, (S_exact, _) = log_linear(*exact, backend="naive")
    assert_close([y, S], [expected, S_exact], 1e-5)
    grads = gradients([y, S], ours)
    assert all(x.isfinite().all() for x in grads)
    assert_close(grads, gradients([expected, S_exact], exact), 1e-4)


@both
def test_documents_count_positions_from_their_start_and_pass_no_gradient(delta: bool):
    inputs = as_leaves(inputs_of(1, 60, 5, delta), torch.float32)
    alone = as_leaves([x[:, 23:] for x in inputs], torch.float32)
    y, (S, seen) = log_linear(*inputs, documents=document_rows([[20, 3, 37]]), chunk_size=16)
    expected, (S_alone, _) = log_linear(*alone, chunk_size=16)
    assert seen.tolist() == [37]
    assert_close([y[:, 23:], S], [expected, S_alone], 1e-6)
    grads = gradients([y[:, 23:], S], inputs)
    assert all(not x[:, :23].any() for x in grads)
    assert_close([x[:, 23:] for x in grads], gradients([expected, S_alone], alone), 1e-5)


def test_documents_may_have_no_decay():
    q, k, v, _, levels = inputs_of(2, 30, 5, delta=False)
    documents = document_rows([[9, 21], [30]])
    y, _ = log_linear(q, k, v, None, levels, documents=documents)
    expected, _ = log_linear(q, k, v, torch.zeros(2, 30, 2), levels, documents=documents)
    assert_close([y], [expected], 1e-6)


def test_levels_may_come_by_query_head():
    q, k, v, g, _, beta = inputs_of(2, 40, 5, True, groups=3)
    levels = torch.rand(2, 40, 6, 5)
    y, _ = log_linear(q, k, v, g, levels, beta)
    k, v, g, beta = (expand_heads(x, 6) for x in (k, v, g, beta))
    assert torch.equal(y, log_linear(q, k, v, g, levels, beta)[0])


@pytest.mark.parametrize("L", [1, 2, 5, 12, 64])
def test_buckets_move_as_their_tokens_do(L: int):
    for now in (0, 1, 6, 7, 8, 100, 1023):
        tokens = {}
        for s in range(now):
            tokens.setdefault(level(now, s, L), []).append(s)
        for then in (now, now + 1, now + 5, now + 64, now + 900):
            moved = later_levels(torch.tensor(now), torch.tensor(then), L)
            assert all(level(then, s, L) == moved[old] for old, bucket in tokens.items() for s in bucket)
            assert (moved >= torch.arange(L)).all()


def test_levels_of_distant_positions_are_exact():
    apart = torch.tensor([0, 1, 2, 3, 4, 2**53 - 1, 2**53, 2**62])
    assert fenwick_level(apart, 64).tolist() == [0, 1, 2, 2, 3, 53, 54, 63]


def test_impossible_arguments_are_refused():
    q, k, v, g, levels, beta = inputs_of(1, 4, 5, True)
    with pytest.raises(ValueError, match=r"levels must be \[B, T, H, L\], 1 <= L <= 64, got \(1, 4, 2\)"):
        log_linear(q, k, v, g, levels[..., 0])
    with pytest.raises(ValueError, match=r"beta must be \[B, T, H\], got \(1, 4, 2, 5\)"):
        log_linear(q, k, v, g, levels, levels)
    _, state = log_linear(q, k, v, g, levels, beta)
    with pytest.raises(ValueError, match="the state has 5 levels, the call 4"):
        log_linear(q, k, v, g, levels[..., :4], beta, state=state)
