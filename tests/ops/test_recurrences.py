"""The recurrences against their float64 token loops: values, gradients, states, padding, documents,
safety.
"""

import importlib
import pkgutil

import pytest
import torch
from op_cases import (
    CASES,
    Case,
    as_leaves,
    assert_close,
    case_of,
    document_rows,
    fla_reference,
    gradients,
    random_splits,
    right_padding,
)

from linearize import ops
from linearize.ops import gla as gla_module
from linearize.ops import simple_gla as simple_gla_module
from linearize.ops.layout import expand_heads
from linearize.ops.linear import linear_attention, normalized
from linearize.ops.recurrence import Recurrence

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def truth(case: Case, inputs: list[torch.Tensor], **options):
    return case.run([x.double() for x in inputs], backend="naive", **options)


@every_case
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 100])
def test_forward_equals_float64_loop(case: Case, T: int, chunk_size: int):
    inputs = case.inputs(2, T)
    outputs, state = case.run(inputs, chunk_size=chunk_size)
    expected, expected_state = truth(case, inputs)
    assert all(x.dtype in (torch.float32, torch.int64) for x in (*outputs, *state))
    assert_close([*outputs, *state], [*expected, *expected_state], case.tolerance)


@every_case
def test_forward_equals_float64_loop_on_long_rows(case: Case):
    inputs = case.inputs(1, 1000)
    outputs, state = case.run(inputs)
    expected, expected_state = truth(case, inputs)
    assert_close([*outputs, *state], [*expected, *expected_state], case.tolerance)


@every_case
@pytest.mark.parametrize(("T", "chunk_size"), [(1, 64), (65, 16), (100, 64)])
def test_gradients_equal_float64_loop(case: Case, T: int, chunk_size: int):
    inputs = case.inputs(2, T, groups=2)
    state = [0.1 * torch.randn_like(x) if x.is_floating_point() else x for x in case.run(inputs)[1]]
    leaves, exact = as_leaves([*inputs, *state], torch.float32), as_leaves([*inputs, *state], torch.float64)
    n = len(inputs)
    outputs, after = case.run(leaves[:n], state=leaves[n:], chunk_size=chunk_size)
    expected, expected_after = case.run(exact[:n], state=exact[n:], backend="naive")
    assert_close(
        gradients([*outputs, *after], leaves), gradients([*expected, *expected_after], exact), 10 * case.tolerance
    )


@every_case
def test_chunk_gradients_pass_gradcheck(case: Case):
    inputs = [x.double().requires_grad_() for x in case.inputs(1, 5, H=1, K=3, V=2)]
    assert torch.autograd.gradcheck(lambda *x: tuple(case.run(list(x), chunk_size=4)[0]), inputs)


@every_case
def test_prefill_in_pieces_and_steps_equals_one_call(case: Case):
    T = 90
    inputs = case.inputs(2, T)
    whole, whole_state = case.run(inputs)
    for lengths in ([1] * T, random_splits(T, 0), random_splits(T, 1)):
        state, pieces = None, []
        for piece in zip(*(x.split(lengths, dim=1) for x in inputs), strict=True):
            outputs, state = case.run(list(piece), state=state)
            pieces.append(outputs)
        joined = [torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True)]
        assert_close([*joined, *state], [*whole, *whole_state], case.tolerance)


@every_case
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_padding_changes_neither_state_nor_real_tokens(case: Case, backend: str):
    lengths, T = [70, 33], 70
    inputs = case.inputs(2, T)
    mask = right_padding(lengths, T)
    for x in inputs[1:]:
        x[~mask] = float("nan")
    outputs, state = case.run(inputs, mask=mask, backend=backend)
    for row, length in enumerate(lengths):
        alone, alone_state = case.run([x[row : row + 1, :length] for x in inputs])
        assert_close([x[row : row + 1, :length] for x in outputs], alone, case.tolerance)
        assert_close([x[row : row + 1] for x in state], alone_state, case.tolerance)
    assert all(x.isfinite().all() for x in outputs)


@every_case
def test_padded_step_leaves_state_bit_identical(case: Case):
    _, state = case.run(case.inputs(2, 9))
    _, after = case.run(case.inputs(2, 1, seed=1), state=state, mask=torch.tensor([[True], [False]]))
    assert all(torch.equal(x[1], y[1]) and not torch.equal(x[0], y[0]) for x, y in zip(after, state, strict=True))


@every_case
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_documents_equal_each_document_alone(case: Case, backend: str):
    rows = [[20, 1, 43, 36], [64, 36]]
    inputs = case.inputs(2, 100)
    outputs, state = case.run(inputs, documents=document_rows(rows), chunk_size=16, backend=backend)
    for row, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            part = (slice(row, row + 1), slice(start, start + length))
            alone, alone_state = case.run([x[part] for x in inputs])
            assert_close([x[part] for x in outputs], alone, case.tolerance)
            start += length
        assert_close([x[row : row + 1] for x in state], alone_state, case.tolerance)


@every_case
def test_documents_and_padding_together(case: Case):
    documents, mask = document_rows([[30, 40], [50, 20]]), right_padding([70, 40], 70)
    documents[1, 50:] = 7
    inputs = case.inputs(2, 70)
    outputs, state = case.run(inputs, documents=documents, mask=mask, chunk_size=16)
    alone, alone_state = case.run([x[1:, :40] for x in inputs])
    assert_close([x[1:, :40] for x in outputs] + [x[1:] for x in state], [*alone, *alone_state], case.tolerance)


def test_normalized_weights_sum_to_one():
    q, k, v = CASES[0].inputs(2, 40)
    num, den, _ = linear_attention(q, k, torch.ones_like(v))
    assert_close([normalized(num, den, eps=0.0)], [torch.ones_like(num)], 1e-5)


def test_every_recurrence_has_a_case():
    found = {
        value.name
        for file in pkgutil.iter_modules(ops.__path__)
        for value in vars(importlib.import_module(f"linearize.ops.{file.name}")).values()
        if isinstance(value, Recurrence)
    }
    assert found == {case.recurrence.name for case in CASES}


@pytest.mark.parametrize("case", [case for case in CASES if case.decay != "none"], ids=lambda case: case.name)
def test_strong_decays_are_safe_and_exact(case: Case):
    q, k, v, _, *gates = case.inputs(1, 1000)
    for g in (
        case.log_decay(1, 1000, 2, 8, -20.0),
        torch.full_like(case.log_decay(1, 1000, 2, 8, 0.0), -20.0),
    ):
        inputs = as_leaves([q, k, v, g, *gates], torch.float32)
        exact = as_leaves([q, k, v, g, *gates], torch.float64)
        outputs, state = case.run(inputs)
        expected, expected_state = case.run(exact, backend="naive")
        assert_close([*outputs, *state], [*expected, *expected_state], case.tolerance)
        grads = gradients([*outputs, *state], inputs)
        assert all(x.isfinite().all() for x in grads)
        assert_close(grads, gradients([*expected, *expected_state], exact), 10 * case.tolerance)


@every_case
def test_bfloat16_is_finite_and_close(case: Case):
    inputs = case.inputs(1, 300)
    if case.decay != "none":
        inputs[3] = case.log_decay(1, 300, 2, 8, -20.0)
    leaves = as_leaves(inputs, torch.bfloat16)
    outputs, state = case.run(leaves)
    expected, expected_state = truth(case, [x.detach() for x in leaves])
    unnormalised = len(outputs) > 1  # linear attention's sums stay in float32 until they are divided
    assert outputs[0].dtype == (torch.float32 if unnormalised else torch.bfloat16)
    assert all(x.dtype in (torch.float32, torch.int64) for x in state)
    assert_close([*outputs, *state], [*expected, *expected_state], 1e-2)
    assert all(x.isfinite().all() for x in gradients(outputs, leaves))


@every_case
def test_autocast_does_not_lower_the_precision(case: Case):
    inputs = case.inputs(1, 80)
    plain, _ = case.run(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, _ = case.run(inputs)
    assert all(torch.equal(x, y) for x, y in zip(under_autocast, plain, strict=True))


@every_case
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("T", [1, 13, 17, 50, 70])
def test_grouped_heads_equal_expanded_heads_bit_for_bit(case: Case, T: int, B: int):
    q, *rest = case.inputs(B, T, groups=3)
    expanded = [expand_heads(x, q.shape[2]) for x in rest]
    assert torch.equal(expanded[0][:, :, 4], rest[0][:, :, 1])
    outputs, state = case.run([q, *rest])
    for x, y in zip([*outputs, *state], [y for part in case.run([q, *expanded]) for y in part], strict=True):
        assert torch.equal(x, y)


@every_case
@pytest.mark.parametrize("changed", [0, 15, 16, 40])
def test_no_output_depends_on_later_tokens(case: Case, changed: int):
    inputs = as_leaves(case.inputs(1, 41), torch.float32)
    outputs, _ = case.run(inputs, chunk_size=16)
    others = [x.detach().clone() for x in inputs]
    for x in others:
        x[:, changed] -= 1.0
    moved, _ = case.run(others, chunk_size=16)
    assert all(torch.equal(x[:, :changed], y[:, :changed]) for x, y in zip(outputs, moved, strict=True))
    assert not torch.equal(outputs[0][:, changed:], moved[0][:, changed:])
    for grad in torch.autograd.grad(sum(x[:, changed].sum() for x in outputs), inputs):
        assert not grad[:, changed + 1 :].any()


@every_case
def test_step_compiles_without_graph_breaks(case: Case):
    _, state = case.run(case.inputs(2, 5))
    inputs = case.inputs(2, 1, seed=3)
    outputs, after = case.run(inputs, state=state)
    torch.compiler.reset()  # all cases share this code, and only so many compilations of it are kept
    compiled = torch.compile(lambda x, s: case.run(x, state=s), backend="eager", fullgraph=True)
    compiled_outputs, compiled_after = compiled(inputs, state)
    assert_close([*compiled_outputs, *compiled_after], [*outputs, *after], 1e-6)


@every_case
def test_chunked_form_compiles_without_graph_breaks(case: Case):
    inputs = case.inputs(2, 40)
    torch.compiler.reset()  # all cases share this code, and only so many compilations of it are kept
    compiled = torch.compile(lambda x: case.run(x, chunk_size=16), backend="eager", fullgraph=True)
    assert_close(compiled(inputs)[0], case.run(inputs, chunk_size=16)[0], 1e-6)


@every_case
def test_impossible_arguments_are_refused(case: Case):
    inputs = case.inputs(2, 8)
    _, state = case.run(inputs)
    with pytest.raises(ValueError, match="documents cannot be combined with an incoming state"):
        case.run(inputs, state=state, documents=document_rows([[8], [8]]))
    with pytest.raises(ValueError, match="power of two, got 48"):
        case.run(inputs, chunk_size=48)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 kv heads"):
        case.run([inputs[0][:, :, [0, 1, 1]], *inputs[1:]])
    with pytest.raises(ValueError, match=r"mask must be \[B, T\] = \(2, 8\), got \(2, 7\)"):
        case.run(inputs, mask=torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must be bool .* got torch.int64; use mask.bool\(\)"):
        case.run(inputs, mask=torch.ones(2, 8, dtype=torch.int64))


def test_segment_sums_keep_small_decays_beside_large_ones():
    g = torch.tensor([-20.0] * 32 + [-1e-3] * 32)
    assert_close([simple_gla_module.segment_sums(g)[40, 35]], [torch.tensor(-5e-3)], 1e-6)
    ones = torch.ones(64, 1)
    scores, since_start, to_end = gla_module.decayed_scores(ones, ones, g[:, None])
    assert_close([scores[40, 35]], [torch.tensor(-5e-3, dtype=torch.float64).exp()], 1e-7)
    assert since_start[31, 0] == -640 and to_end[63, 0] == 0


def test_linear_attention_agrees_with_fla_reference():
    q, k, v = CASES[0].inputs(2, 70)
    reference = fla_reference("linear_attn", "naive_recurrent_linear_attn")
    expected, S = reference(q, k, v, scale=1.0, output_final_state=True)
    num, _, state = linear_attention(q, k, v)
    assert_close([num, state[0]], [expected, S], 1e-5)
    fraction, (S, z) = reference(q, k, v, scale=1.0, output_final_state=True, normalize=True)
    num, den, state = linear_attention(q, k, v)
    assert_close([normalized(num, den, eps=1e-10), *state], [fraction, S, z[:, 0]], 1e-5)


@pytest.mark.parametrize("name", ["simple_gla", "gla"])
def test_gated_recurrences_agree_with_fla_reference(name: str):
    case = case_of(name)
    inputs = case.inputs(2, 70)
    _, start = case.run(case.inputs(2, 5, seed=2))
    reference = fla_reference(name, f"naive_recurrent_{name}")
    expected, S = reference(*inputs, initial_state=start[0], output_final_state=True)
    outputs, state = case.run(inputs, state=start)
    assert_close([*outputs, *state], [expected, S], 1e-5)


def test_long_float16_sums_do_not_overflow():
    q, v = torch.full((1, 4096, 1, 8), 0.25).half(), torch.full((1, 4096, 1, 4), 60.0).half()
    num, den, _ = linear_attention(q, q, v)
    assert num.max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(num / den[..., None], v.float())
