"""mLSTM against the paper's formula without a stabiliser, in float64, for gates of any strength."""

import math

import pytest
import torch
from op_cases import as_leaves, assert_close, case_of, gradients

from linearize.ops.mlstm import mlstm

Tensors = list[torch.Tensor]


def paper(q, k, v, g, i, C=0.0, n=0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """xLSTM, eqs. 19 - 21, every weight of an earlier token written out; C, n before the first token."""
    outs, scale = [], q.shape[-1] ** -0.5
    for t in range(q.shape[1]):
        forget, write = g[:, t].exp(), i[:, t].exp()
        C = forget[..., None, None] * C + write[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        n = forget[..., None] * n + write[..., None] * k[:, t]
        num, den = (torch.einsum("bhk,bhk...->bh...", scale * q[:, t], x) for x in (C, n))
        outs.append(num / den.abs().clamp_min(1.0)[..., None])
    return torch.stack(outs, dim=1), C, n


def inputs_of(strength: float, T: int = 150, signed: bool = False) -> Tensors:
    """Input gates up to +-strength, forget gates mostly weak, some at -20."""
    q, k, v, _, _ = case_of("mlstm").inputs(2, T)
    if signed:
        q, k = torch.randn_like(q), torch.randn_like(k)
    g = case_of("mlstm").log_decay(2, T, 2, 8, -20.0)
    return [q, k, v, g, strength * (2 * torch.rand(2, T, 2) - 1)]


@pytest.mark.parametrize("strength", [1.0, 10.0, 30.0])
@pytest.mark.parametrize("form", ["chunk", "steps"])
def test_agrees_with_the_unstabilised_formula(strength: float, form: str):
    inputs = inputs_of(strength)
    leaves, exact = as_leaves(inputs, torch.float32), as_leaves(inputs, torch.float64)
    y, (C, n, m) = mlstm(*leaves, chunk_size=32, backend="torch" if form == "chunk" else "naive")
    expected, C_true, n_true = paper(*exact)
    assert_close([y], [expected], 1e-5)
    unit = m.detach().double().exp()
    assert_close([C * unit[..., None, None], n * unit[..., None]], [C_true, n_true], 1e-5)
    grads = gradients([y], leaves)
    assert all(x.isfinite().all() for x in grads)
    assert_close(grads, gradients([expected], exact), 1e-4)


def test_formula_and_both_forms_are_equal_in_float64_for_keys_of_any_sign():
    inputs = [x.double() for x in inputs_of(30.0, signed=True)]
    expected, _, _ = paper(*inputs)
    for backend in ("torch", "naive"):
        y, _ = mlstm(*inputs, backend=backend)
        assert_close([y], [expected], 1e-8)


def test_outputs_do_not_depend_on_the_stabiliser():
    q, k, v, g, i = (x.double() for x in inputs_of(3.0, T=20))
    torch.manual_seed(1)
    C, n = torch.randn(2, 2, 8, 6, dtype=torch.float64), torch.rand(2, 2, 8, dtype=torch.float64)
    expected, _, _ = paper(q, k, v, g, i, C, n)
    for m in (-2.0, 0.0, 5.0):
        state = (C * math.exp(-m), n * math.exp(-m), torch.full((2, 2), m, dtype=torch.float64))
        assert_close([mlstm(q, k, v, g, i, state=state, chunk_size=8)[0]], [expected], 1e-12)


def test_gradients_flow_through_a_state_carried_on():
    inputs = inputs_of(3.0, T=40)
    whole, pieces = (as_leaves(inputs, torch.float64) for _ in range(2))
    expected, _ = mlstm(*whole)
    first, state = mlstm(*(x[:, :25] for x in pieces))
    second, _ = mlstm(*(x[:, 25:] for x in pieces), state=state)
    assert_close(gradients([torch.cat([first, second], dim=1)], pieces), gradients([expected], whole), 1e-10)


@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_closed_gates_are_safe_and_exact(backend: str):
    inputs = inputs_of(30.0, T=70)
    inputs[3][:, [0, 20, 47]] = float("-inf")
    inputs[4][:, [0, 1, 2, 20, 33]] = float("-inf")
    leaves, exact = as_leaves(inputs, torch.float32), as_leaves(inputs, torch.float64)
    y, state = mlstm(*leaves, chunk_size=16, backend=backend)
    assert not y[:, :3].any() and not y[:, 20].any()
    assert_close([y], [paper(*exact)[0]], 1e-5)
    grads = gradients([y, *state], leaves)
    assert all(x.isfinite().all() for x in grads)
    assert_close([mlstm(*exact, backend=backend)[0]], [paper(*exact)[0]], 1e-10)


def test_long_rows_of_one_dominant_token_do_not_drift():
    """One token at exp(30) and weak decays: m_t is rounded a thousand times, the memory must not be."""
    q, k, v, g, i = inputs_of(1.0, T=1000)
    g, i = -1e-3 * torch.rand_like(g), i.index_fill(1, torch.tensor(0), 30.0)
    expected, C, _ = paper(*(x.double() for x in (q, k, v, g, i)))
    for backend in ("torch", "naive"):
        y, state = mlstm(q, k, v, g, i, backend=backend)
        assert_close([y, state[0] * state[2].double().exp()[..., None, None]], [expected, C], 1e-5)


def test_gates_that_do_not_fit_are_refused():
    q, k, v, g, i = inputs_of(1.0, T=4)
    with pytest.raises(ValueError, match=r"mlstm: g and i must both be \[B, T, H\], got \(2, 4, 2\) and \(2, 4\)"):
        mlstm(q, k, v, g, i[..., 0])
    with pytest.raises(ValueError, match="fla has no kernel for it|need a CUDA tensor"):
        mlstm(q, k, v, g, i, backend="fla")
