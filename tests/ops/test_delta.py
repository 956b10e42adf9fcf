"""The delta rules against other implementations: fla's token loops and the torch path of Qwen3-Next in
transformers.
"""

import pytest
import torch
from op_cases import as_leaves, assert_close, case_of, document_rows, fla_reference, gradients
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from linearize.ops.delta import DELTA_RULE, delta_rule
from linearize.ops.layout import expand_heads

NAMES = ["delta", "gated_delta", "kda"]
Result = tuple[torch.Tensor, torch.Tensor]


def fla_delta(q, k, v, beta, state) -> Result:
    reference = fla_reference("delta_rule", "delta_rule_recurrence")
    out, after = reference(*(x.transpose(1, 2) for x in (q, k, v, beta)), initial_state=state)
    return out.transpose(1, 2), after


def fla_gated_delta(q, k, v, g, beta, state) -> Result:
    reference = fla_reference("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    return reference(q, k, v, beta, g, initial_state=state, output_final_state=True)


def fla_kda(q, k, v, g, beta, state) -> Result:
    reference = fla_reference("kda", "naive_recurrent_kda")
    return reference(q, k, v, g, beta, initial_state=state, output_final_state=True)


def qwen3_next(form):
    def call(q, k, v, g, beta, state) -> Result:
        return form(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)

    return call


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("delta", fla_delta),
        ("gated_delta", fla_gated_delta),
        ("gated_delta", qwen3_next(torch_chunk_gated_delta_rule)),
        ("gated_delta", qwen3_next(torch_recurrent_gated_delta_rule)),
        ("kda", fla_kda),
    ],
    ids=["fla-delta", "fla-gated_delta", "qwen3_next-chunk", "qwen3_next-loop", "fla-kda"],
)
def test_agrees_with_another_implementation(name: str, reference):
    case = case_of(name)
    inputs = case.inputs(2, 100)
    _, start = case.run(case.inputs(2, 5, seed=2))
    ours, theirs = (as_leaves([*inputs, *start], torch.float32) for _ in range(2))
    outputs, state = case.run(ours[:-1], state=ours[-1:])
    expected = list(reference(*theirs))
    assert_close([*outputs, *state], expected, 1e-5)
    assert_close(gradients([*outputs, *state], ours), gradients(expected, theirs), 1e-4)


def test_zero_decay_and_one_decay_for_all_channels_change_nothing():
    q, k, v, g, beta = case_of("gated_delta").inputs(2, 70)
    for vague, exact in ((torch.zeros_like(g), None), (g.unsqueeze(-1).expand_as(k), g)):
        assert_close(list(delta_rule(q, k, v, vague, beta)), list(delta_rule(q, k, v, exact, beta)), 1e-5)


@pytest.mark.parametrize("beta", [1.0, 1.9])
def test_a_row_of_one_key_keeps_its_last_values_or_reflects_them(beta: float):
    """The worst conditioned system: all keys the same, so that each token corrects all before it."""
    _, k, v, _, _ = case_of("gated_delta").inputs(1, 200, H=1)
    k = k[:, :1].expand_as(k)
    held, kept = torch.zeros_like(v[:, 0]).double(), []
    for t in range(200):
        held = (1 - beta) * held + beta * v[:, t]
        kept.append(held)
    betas = torch.full((1, 200, 1), beta)
    out, _ = delta_rule(k, k, v, None, betas, scale=1.0)
    assert_close([out], [torch.stack(kept, dim=1)], 1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [1, 70])
def test_a_row_does_not_depend_on_its_batch(name: str, T: int):
    case = case_of(name)
    inputs = case.inputs(7, T, K=64, V=64)
    _, state = case.run(case.inputs(7, 5, K=64, V=64, seed=2))
    outputs, after = case.run(inputs, state=state)
    alone, alone_after = case.run([x[3:4] for x in inputs], state=[x[3:4] for x in state])
    assert all(torch.equal(x[3:4], y) for x, y in zip([*outputs, *after], [*alone, *alone_after], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_document_borders_pass_no_gradient_and_no_nan(name: str):
    case = case_of(name)
    inputs = as_leaves(case.inputs(1, 60), torch.float32)
    outputs, _ = case.run(inputs, documents=document_rows([[20, 40]]), chunk_size=16)
    grads = torch.autograd.grad(outputs[0][:, 20:].sum(), inputs)
    assert all(x.isfinite().all() and not x[:, :20].any() and x[:, 20:].any() for x in grads)


def test_grouped_betas_may_come_by_kv_head_or_by_query_head():
    q, k, v, g, beta = case_of("gated_delta").inputs(2, 40, groups=3)
    wide, _ = delta_rule(q, k, v, expand_heads(g, 6), expand_heads(beta, 6))
    assert torch.equal(delta_rule(q, k, v, g, beta)[0], wide)


def test_kernel_limits_are_obstacles():
    q = torch.zeros(1, 1, 1, 300)
    assert "at most 256 channels, not 300" in DELTA_RULE.obstacle(q, q, q, None, q[..., 0])


def test_impossible_gates_are_refused():
    q, k, v, g, beta = case_of("kda").inputs(1, 4)
    with pytest.raises(ValueError, match=r"g must be \[B, T, H\] or \[B, T, H, K\], got \(1, 4, 2, 7\)"):
        delta_rule(q, k, v, g[..., :7], beta)
    with pytest.raises(ValueError, match=r"beta must be \[B, T, H\], got \(1, 4, 2, 8\)"):
        delta_rule(q, k, v, g, g)
