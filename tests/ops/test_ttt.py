"""TTT-linear against the inner gradients by autograd, and against fla's dual form."""

import pytest
import torch
import torch.nn.functional as F
from op_cases import as_leaves, assert_close, case_of, document_rows, fla_reference, gradients, right_padding

from linearize.ops.ttt import Inner, run_inner, ttt_linear

D = 6


def tokens_of(B: int, T: int, groups: int = 1) -> list[torch.Tensor]:
    """q, k, v, eta and gain."""
    q, k, v, eta, gain = case_of("ttt").inputs(B, T, K=D, groups=groups)
    return [q, k, v, 4 * eta, gain]


def parts_of(heads: int = 2) -> list[torch.Tensor]:
    """ln_w, ln_b, w0 and b0."""
    torch.manual_seed(5)
    ln_w, ln_b, b0 = (0.2 * torch.randn(heads, D) for _ in range(3))
    return [1 + ln_w, ln_b, torch.randn(heads, D, D), b0]


def call(tokens: list[torch.Tensor], parts: list[torch.Tensor], **options) -> tuple[torch.Tensor, tuple]:
    return ttt_linear(*tokens[:4], *parts, *tokens[4:], **options)


def by_autograd(tokens: list[torch.Tensor], parts: list[torch.Tensor], size: int, eps: float = 1e-6):
    """Outputs and the state; the inner loss is differentiated token by token at the mini-batch's first weights."""
    q, k, v, eta, gain = tokens
    ln_w, ln_b, w0, b0 = parts
    B, T, H, _ = q.shape

    def f(x, W, b):
        z = x @ W + b
        return x + F.layer_norm(z, (D,), eps=eps) * ln_w[h] + ln_b[h]

    out, W_rows, b_rows, dW_rows, db_rows = torch.zeros_like(v), [], [], [], []
    for row in range(B):
        for h in range(H):
            W, b = w0[h], b0[h]
            dW, db = torch.zeros_like(W), torch.zeros_like(b)
            for t in range(T):
                loss = 0.5 * (f(k[row, t, h], W, b) - v[row, t, h]).square().sum()
                by_W, by_b = torch.autograd.grad(loss, (W, b), create_graph=True)
                dW, db = dW + eta[row, t, h] * by_W, db + eta[row, t, h] * by_b
                new = W - gain[row, t, h] * dW, b - gain[row, t, h] * db
                place = torch.zeros(B, T, H, 1, dtype=v.dtype)
                place[row, t, h] = 1
                out = out + place * f(q[row, t, h], *new)
                if (t + 1) % size == 0:
                    W, b = new
                    dW, db = torch.zeros_like(W), torch.zeros_like(b)
            for kept, x in zip((W_rows, b_rows, dW_rows, db_rows), (W, b, dW, db), strict=True):
                kept.append(x)
    return out, [torch.stack(x).unflatten(0, (B, H)) for x in (W_rows, b_rows, dW_rows, db_rows)]


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_equals_gradient_descent_by_autograd(size: int, backend: str):
    """Values, state and the gradients of all inputs, the norm and the first weights among them."""
    tokens, parts = tokens_of(2, 23), parts_of()
    ours, exact = as_leaves([*tokens, *parts], torch.float32), as_leaves([*tokens, *parts], torch.float64)
    y, (*state, count) = call(ours[:5], ours[5:], batch_tokens=size, backend=backend)
    expected, expected_state = by_autograd(exact[:5], exact[5:], size)
    assert count.tolist() == [23 % size] * 2
    assert_close([y, *state], [expected, *expected_state], 1e-5)
    results, truths = gradients([y, *state], ours), gradients([expected, *expected_state], exact)
    assert_close(results, truths, 1e-4)


def test_agrees_with_fla_reference():
    """fla has a rate per read-out only (`gain` here, with eta = 1), and adds x W + b, not x, to the norm."""
    q, k, v, _, gain = tokens_of(2, 48)
    inputs = [q, k, v, 0.1 * gain, *parts_of()]
    ours, theirs = (as_leaves(inputs, torch.float32) for _ in range(2))
    q, k, v, gain, *parts = ours
    inner = Inner(*parts, eps=1e-6, batch_tokens=16)
    options = {"mask": None, "documents": None, "state": None, "chunk_size": 64, "backend": "auto"}
    read, (W, b, *_) = run_inner(inner, q, k, v, torch.ones_like(gain), gain, scale=0.5, **options)
    q, k, v, gain, ln_w, ln_b, w0, b0 = theirs
    starts = [x.expand(2, *x.shape) for x in (w0, b0.unsqueeze(1))]
    reference = fla_reference("ttt", "chunk_ttt_linear_ref")
    # it scales q in place, which no leaf allows
    expected, S, bias = reference(q * 1, k, v, ln_w, ln_b, gain.unsqueeze(-1), 0.5, 1e-6, 16, *starts, True)
    results, truths = [read + inner.normalised(read), W, b], [expected, S, bias.squeeze(2)]
    assert_close(results, truths, 1e-5)
    assert_close(gradients(results, ours), gradients(truths, theirs), 1e-4)


def test_rows_may_go_on_in_different_places_of_a_mini_batch():
    lengths, T = [13, 5, 0, 8], 21
    first, second, parts = tokens_of(4, 13), [x.flip(1) for x in tokens_of(4, T)], parts_of()
    ours, whole = (as_leaves([*first, *second, *parts], torch.float32) for _ in range(2))
    mask = right_padding([T, 7, T, 2], T)
    _, state = call(ours[:5], ours[10:], batch_tokens=8, mask=right_padding(lengths, 13))
    assert state[-1].tolist() == [5, 5, 0, 0]
    y, (*after, count) = call(ours[5:10], ours[10:], batch_tokens=8, state=state, mask=mask)
    assert count.tolist() == [2, 4, 5, 2]
    outs, states = [], []
    for row, length in enumerate(lengths):
        real = int(mask[row].sum())
        pieces = zip(whole[:5], whole[5:10], strict=True)
        joined = [torch.cat([a[row : row + 1, :length], b[row : row + 1, :real]], dim=1) for a, b in pieces]
        out, (*alone, _) = call(joined, whole[10:], batch_tokens=8, backend="naive")
        outs.append(F.pad(out[:, length:], (0, 0, 0, 0, 0, T - real)))
        states.append(alone)
    expected = [torch.cat(outs), *(torch.cat(x) for x in zip(*states, strict=True))]
    results = [torch.where(mask[..., None, None], y, 0), *after]
    assert_close(results, expected, 1e-5)
    assert_close(gradients(results, ours), gradients(expected, whole), 1e-4)


def test_grouped_heads_share_the_inner_model_of_their_kv_head():
    tokens, parts = tokens_of(2, 40, groups=3), parts_of()
    y, state = call(tokens, parts)
    wide = [x.repeat_interleave(3, dim=2) for x in tokens[1:]], [x.repeat_interleave(3, dim=0) for x in parts]
    expected, wide_state = call([tokens[0], *wide[0]], wide[1])
    assert all(torch.equal(a, b) for a, b in zip([y, *state], [expected, *wide_state], strict=True))


def test_documents_begin_with_the_first_weights_and_pass_no_gradient():
    tokens, parts = tokens_of(1, 60), parts_of()
    inputs, alone = as_leaves([*tokens, *parts], torch.float32), [*(x[:, 23:] for x in tokens), *parts]
    alone = as_leaves(alone, torch.float32)
    y, state = call(inputs[:5], inputs[5:], documents=document_rows([[20, 3, 37]]))
    expected, alone_state = call(alone[:5], alone[5:])
    assert_close([y[:, 23:], *state], [expected, *alone_state], 1e-6)
    grads = gradients([y[:, 23:], *state], inputs)
    assert all(not x[:, :23].any() for x in grads[:5])
    results = [*(x[:, 23:] for x in grads[:5]), *grads[5:]]
    assert_close(results, gradients([expected, *alone_state], alone), 1e-5)


def test_a_gain_of_one_is_the_default_and_chunk_size_changes_nothing():
    tokens, parts = tokens_of(1, 40), parts_of()
    tokens[4] = torch.ones_like(tokens[4])
    y, _ = call(tokens, parts, chunk_size=8)
    assert torch.equal(y, call(tokens[:4], parts)[0])
    assert not torch.allclose(y, call(tokens[:4], parts, batch_tokens=8)[0])


def test_impossible_arguments_are_refused():
    tokens, parts = tokens_of(1, 4), parts_of()
    with pytest.raises(ValueError, match="keys and values of one size, got 6, 5"):
        call([*tokens[:2], tokens[2][..., :5], *tokens[3:]], parts)
    with pytest.raises(ValueError, match=r"w0 must be \[H, 6, 6\], got \(2, 6, 5\)"):
        call(tokens, [*parts[:2], parts[2][..., :5], parts[3]])
    with pytest.raises(ValueError, match=r"eta must be \[B, T, H\], got \(1, 4, 2, 1\)"):
        call([*tokens[:3], tokens[3].unsqueeze(-1)], parts)
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, got 0"):
        call(tokens, parts, batch_tokens=0)
