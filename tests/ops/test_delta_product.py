"""Several delta-rule steps per token against the formula, fla's token loop, and the delta rule itself."""

import pytest
import torch
from op_cases import as_leaves, assert_close, case_of, document_rows, fla_reference, gradients

from linearize.ops.delta import delta_rule
from linearize.ops.delta_product import delta_product


def random_inputs(n: int, decay: str, T: int = 50) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    B, H, K, V = 2, 2, 8, 6
    k = torch.nn.functional.normalize(torch.randn(B, T, H, n, K), dim=-1)
    g = {"none": None, "head": -torch.rand(B, T, H), "channel": -torch.rand(B, T, H, K)}[decay]
    return [torch.randn(B, T, H, K), k, torch.randn(B, T, H, n, V), g, 2 * torch.rand(B, T, H, n)]


def written_out(q, k, v, g, beta, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The transition matrices multiplied out, in float64."""
    q, k, v, beta = (x.double() for x in (q, k, v, beta))
    B, T, H, n, K = k.shape
    S, eye, outs = k.new_zeros(B, H, K, v.shape[-1]), torch.eye(K, dtype=torch.float64), []
    for t in range(T):
        if g is not None:
            alpha = g[:, t].double().exp()
            S = (alpha[..., None] if g.dim() == 4 else alpha[..., None, None]) * S
        for j in range(n):
            key, b = k[:, t, :, j, :, None], beta[:, t, :, j, None, None]
            S = (eye - b * key @ key.mT) @ S + b * key @ v[:, t, :, j, None, :]
        outs.append(scale * (q[:, t, :, None, :] @ S)[..., 0, :])
    return torch.stack(outs, dim=1), S


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_equals_the_formula(n: int, decay: str, backend: str):
    inputs = random_inputs(n, decay)
    assert_close(list(delta_product(*inputs, backend=backend)), list(written_out(*inputs, scale=8**-0.5)), 1e-5)


def test_agrees_with_fla_reference():
    case = case_of("delta_product")
    inputs = case.inputs(2, 70)
    ours, theirs = (as_leaves(inputs, torch.float32) for _ in range(2))
    outputs, state = case.run(ours)
    q, k, v, g, beta = theirs
    steps = [x.transpose(2, 3).flatten(1, 2) for x in (k, v, beta)]
    reference = fla_reference("gated_delta_product", "naive_recurrent_gated_delta_product")
    expected = reference(q, *steps[:2], g, steps[2], scale=8**-0.5, output_final_state=True, num_householder=2)
    assert_close([*outputs, *state], list(expected), 1e-5)
    assert_close(gradients([*outputs, *state], ours), gradients(list(expected), theirs), 1e-4)


def test_one_step_is_the_delta_rule():
    q, k, v, g, beta = random_inputs(1, "head")
    single = delta_rule(q, k[..., 0, :], v[..., 0, :], g, beta[..., 0])
    for x, y in zip(delta_product(q, k, v, g, beta), single, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("decay", ["none", "channel"])
def test_documents_are_kept_apart_with_and_without_decay(decay: str):
    inputs = random_inputs(3, decay)
    out, state = delta_product(*inputs, documents=document_rows([[20, 30], [20, 30]]), chunk_size=16)
    parts = [delta_product(*(None if x is None else x[:, part] for x in inputs)) for part in (slice(20), slice(20, 50))]
    assert_close([out, state], [torch.cat([x for x, _ in parts], dim=1), parts[1][1]], 1e-5)


def test_steps_that_do_not_fit_are_refused():
    q, k, v, g, beta = random_inputs(2, "head", T=4)
    with pytest.raises(ValueError, match="with one n >= 1, got"):
        delta_product(q, k, v, g, beta[..., :1])
    with pytest.raises(ValueError, match="with one n >= 1, got"):
        delta_product(q, k[..., 0, :], v, g, beta)
    with pytest.raises(ValueError, match="shapes do not fit"):
        delta_product(q, k[..., :7], v, g, beta)
