"""What every mixer must do the same way: pieces, batches, causality, gradients, grouped heads, documents, state."""

import pytest
import torch
from mixer_cases import CASES, Case, assert_same_state
from ops.op_cases import as_leaves, assert_close, document_rows, random_splits, right_padding
from safetensors.torch import load, save
from torch.utils._pytree import tree_leaves

from linearize.mixers.base import State, branch_off, branches_of
from linearize.testing.calls import HEADS, KV_HEADS, Tensors, inputs, nbytes, run, run_pieces

every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
@pytest.mark.parametrize("T", [1, 63, 64, 65, 100])
@torch.no_grad()
def test_pieces_and_steps_equal_one_call(case: Case, T: int):
    mixer, given = case.mixer(), inputs(2, T)
    whole, whole_state = run(mixer, given)
    for lengths in ([1] * T, random_splits(T, 0), random_splits(T, 1)):
        y, state = run_pieces(mixer, given, lengths)
        assert_close([y], [whole], case.tolerance)
        assert_same_state(state, whole_state, case.tolerance)


@every_case
@torch.no_grad()
def test_pieces_and_steps_equal_one_call_on_long_rows(case: Case):
    mixer, given = case.mixer(), inputs(1, 1000)
    whole, whole_state = run(mixer, given)
    for lengths in ([940] + [1] * 60, random_splits(1000, 0)):
        y, state = run_pieces(mixer, given, lengths)
        assert_close([y], [whole], case.tolerance)
        assert_same_state(state, whole_state, case.tolerance)


@pytest.mark.parametrize("case", [case for case in CASES if case.has("chunk_size")], ids=str)
@torch.no_grad()
def test_chunk_size_does_not_matter(case: Case):
    given = inputs(2, 100)
    whole, whole_state = run(case.mixer(chunk_size=64), given)
    for chunk_size in (1, 16, 128):
        y, state = run(case.mixer(chunk_size=chunk_size), given)
        assert_close([y], [whole], case.tolerance)
        assert_same_state(state, whole_state, case.tolerance)


@every_case
@pytest.mark.parametrize("T", [1, 65, 100])
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(case: Case, T: int):
    mixer, given = case.mixer(), inputs(5, T)
    together, state = run(mixer, given)
    following, _ = run(mixer, inputs(5, 1, seed=3), state, start=T)
    for row in range(5):
        alone, alone_state = run(mixer, [x[row : row + 1] for x in given])
        after, _ = run(mixer, [x[row : row + 1] for x in inputs(5, 1, seed=3)], alone_state, start=T)
        results, truths = [together[row], following[row]], [alone[0], after[0]]
        # Not bit for bit: matrix products and vectorised functions are laid out differently for one row.
        assert_close(results, truths, 1e-5)


@every_case
@pytest.mark.parametrize(("B", "T"), [(2, 13), (3, 70), (5, 100)])
@torch.no_grad()
def test_a_row_has_the_same_bits_however_long_its_neighbours_are(case: Case, B: int, T: int):
    """In the prefill, in pieces after it and in steps, for rows of a batch of one shape; found for every mixer."""
    mixer, given, more = case.mixer(), inputs(B, T), inputs(B, 4, seed=3)
    found = []
    for length in (T, 1, T // 2, T - 1):
        lengths = [T] + [length] * (B - 1)
        y, state = run(mixer, given, mask=right_padding(lengths, T))
        outputs = [y[0]]
        for piece in (slice(0, 3), slice(3, 4)):
            positions = torch.tensor(lengths)[:, None] + torch.arange(4)[piece]
            y, state = run(mixer, [x[:, piece] for x in more], state, positions=positions)
            outputs.append(y[0])
        found.append(torch.cat(outputs))
    assert all(torch.equal(x, found[0]) for x in found[1:])


@every_case
@torch.no_grad()
def test_padding_is_not_seen(case: Case):
    lengths, T = [100, 63, 64, 65, 1], 100
    mixer, given, more = case.mixer(), inputs(5, T), inputs(5, 3, seed=3)
    mask = right_padding(lengths, T)
    for x in given:
        x[~mask] *= 100.0
    y, state = run(mixer, given, mask=mask)
    following, _ = run(mixer, more, state, positions=torch.tensor(lengths)[:, None] + torch.arange(3))
    assert y.isfinite().all()
    for row, n in enumerate(lengths):
        alone, alone_state = run(mixer, [x[row : row + 1, :n] for x in given])
        after, _ = run(mixer, [x[row : row + 1] for x in more], alone_state, start=n)
        assert_close([y[row : row + 1, :n], following[row : row + 1]], [alone, after], case.tolerance)


@every_case
@pytest.mark.parametrize("first", [0, 30])
@torch.no_grad()
def test_a_padded_step_changes_no_state(case: Case, first: int):
    mixer, step, more = case.mixer(), inputs(2, 1, seed=1), inputs(2, 3, seed=2)
    state = run(mixer, inputs(2, first))[1] if first else None
    y, after = run(mixer, step, state, start=first, mask=torch.tensor([[True], [False]]))
    assert y.isfinite().all()
    following, _ = run(mixer, more, after, positions=torch.tensor([[first + 1], [first]]) + torch.arange(3))
    stepped, _ = run(mixer, more, run(mixer, step, state, start=first)[1], start=first + 1)
    unstepped, _ = run(mixer, more, state, start=first)
    assert_close([following[0], following[1]], [stepped[0], unstepped[1]], case.tolerance)


@every_case
@torch.no_grad()
def test_packed_documents_equal_each_document_alone(case: Case):
    rows = [[20, 1, 43, 36], [64, 36]]
    mixer, given, more = case.mixer(), inputs(2, 100), inputs(2, 3, seed=3)
    positions = torch.tensor([[i for n in row for i in range(n)] for row in rows])
    y, state = run(mixer, given, positions=positions, documents=document_rows(rows))
    following, _ = run(mixer, more, state, start=36)
    for row, lengths in enumerate(rows):
        start = 0
        for n in lengths:
            part = (slice(row, row + 1), slice(start, start + n))
            alone, alone_state = run(mixer, [x[part] for x in given])
            assert_close([y[part]], [alone], case.tolerance)
            start += n
        after, _ = run(mixer, [x[row : row + 1] for x in more], alone_state, start=36)
        assert_close([following[row : row + 1]], [after], case.tolerance)


@every_case
@pytest.mark.parametrize("changed", [0, 1, 15, 16, 63, 64, 99])
def test_no_output_depends_on_later_tokens(case: Case, changed: int):
    mixer, leaves = case.mixer(), as_leaves(inputs(1, 100), torch.float32)
    y, _ = run(mixer, leaves)
    others = [x.detach().clone() for x in leaves]
    for x in others:
        x[:, changed] += 1.0
    moved, _ = run(mixer, others)
    assert torch.equal(y[:, :changed], moved[:, :changed])
    assert not torch.equal(y[:, changed], moved[:, changed])
    for grad in torch.autograd.grad(y[:, changed].sum(), leaves, allow_unused=True):
        assert grad is None or not grad[:, changed + 1 :].any()


@every_case
@pytest.mark.parametrize("T", [1, 65, 100])
def test_gradients_equal_the_float64_loop(case: Case, T: int):
    backend = {"backend": "naive"} if case.has("backend") else {}
    mixer, exact_mixer = case.mixer(), case.mixer(torch.float64, **backend)
    leaves, exact = as_leaves(inputs(2, T), torch.float32), as_leaves(inputs(2, T), torch.float64)
    documents = document_rows([[T], [T]])
    documents[:, T // 3 :] += 1
    mask = right_padding([T, max(T - 7, 1)], T)
    for options in ({}, {"mask": mask, "documents": documents}):
        y, state = run(mixer, leaves, **options)
        expected, expected_state = run(exact_mixer, exact, **options)
        assert expected.dtype == torch.float64
        real = mask if options else torch.ones_like(mask)
        assert_close([y[real]], [expected[real]], case.tolerance)
        grads = loss_gradients(y[real], state, [*leaves, *mixer.parameters()])
        truths = loss_gradients(expected[real], expected_state, [*exact, *exact_mixer.parameters()])
        largest = max(float(x.abs().max()) for x in truths)
        for grad, truth in zip(grads, truths, strict=True):
            # Where a gradient cancels to (nearly) nothing, that of q with one token, rounding is all there is to see.
            scale = max(float(truth.abs().max()), 1e-2 * largest)
            assert (grad.double() - truth).abs().max() <= 10 * case.tolerance * scale


def loss_gradients(y: torch.Tensor, state: State, wanted: Tensors) -> Tensors:
    """Gradients of a fixed random functional of the output and the state; zero for what does not enter."""
    outputs = [y, *(leaf for leaf in tree_leaves(state) if leaf.requires_grad)]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    return list(torch.autograd.grad(outputs, wanted, weights, allow_unused=True, materialize_grads=True))


@every_case
@pytest.mark.parametrize("T", [1, 13, 17, 50, 100])
@torch.no_grad()
def test_grouped_heads_equal_expanded_heads_bit_for_bit(case: Case, T: int):
    grouped, expanded = case.mixer(), case.mixer(kv_heads=HEADS)
    wanted = expanded.state_dict()
    parameters = {name: expand_rows(x, wanted[name].shape[0]) for name, x in grouped.state_dict().items()}
    expanded.load_state_dict(parameters)
    state = wide_state = None
    for start, length in ((0, T), (T, 1)):
        q, k, v, x = inputs(2, length, seed=start)
        wide = [t[:, :, [h // (HEADS // KV_HEADS) for h in range(HEADS)]] for t in (k, v)]
        y, state = run(grouped, [q, k, v, x], state, start=start)
        wide_y, wide_state = run(expanded, [q, *wide, x], wide_state, start=start)
        if "silu" in str(case.settings.get("conv")):  # vectorised functions are laid out differently for more heads
            assert_close([y], [wide_y], case.tolerance)
        else:
            assert torch.equal(y, wide_y)


def expand_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Parameters of key heads, repeated for the query heads that they serve."""
    return x if x.shape[0] == rows else x.repeat_interleave(rows // x.shape[0], dim=0)


@every_case
@torch.no_grad()
def test_training_mode_changes_nothing(case: Case):
    mixer, given, step = case.mixer(), inputs(2, 100), inputs(2, 1, seed=1)
    results = []
    for training in (True, False):
        y, state = run(mixer.train(training), given)
        results.append([y, run(mixer, step, state, start=100)[0], *tree_leaves(state)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_case
@torch.no_grad()
def test_a_saved_mixer_reloads_to_the_same_bits(case: Case):
    mixer, given = case.mixer(), inputs(2, 100)
    other = case.mixer_class(mixer.config, mixer.shape)
    for tensor in other.state_dict().values():
        tensor.fill_(float("nan"))
    other.load_state_dict(load(save(mixer.state_dict())))
    assert torch.equal(run(other, given)[0], run(mixer, given)[0])


@every_case
@torch.no_grad()
def test_the_state_has_the_same_size_at_every_length(case: Case):
    mixer = case.mixer()
    sizes = {nbytes(run(mixer, inputs(2, T))[1]) for T in (1, 100, 1000)}
    assert len(sizes) == 1 and sizes.pop() > 0
    assert all(leaf.shape[0] == 2 for leaf in tree_leaves(run(mixer, inputs(2, 3))[1]))


@every_case
@torch.no_grad()
def test_a_call_changes_neither_its_inputs_nor_the_state_it_got(case: Case):
    mixer, given = case.mixer(), inputs(2, 100)
    _, state = run(mixer, given)
    before = [x.clone() for x in tree_leaves(state)]
    for T in (1, 30):
        more = inputs(2, T, seed=1)
        run(mixer, more, state, start=100)
        assert all(torch.equal(a, b) for a, b in zip(more, inputs(2, T, seed=1), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(state), before, strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case.mixer().branches], ids=str)
@torch.no_grad()
def test_a_branch_goes_off_and_comes_back(case: Case):
    mixer, given = case.mixer(), inputs(2, 100)
    whole, state = run(mixer, given)
    assert branches_of(mixer) == sorted(mixer.branches)
    for branch in mixer.branches:
        with pytest.raises(KeyError), branch_off(mixer, branch) as touched:
            assert touched == 1
            without, same_state = run(mixer, given)
            assert without.isfinite().all() and not torch.equal(without, whole)
            assert all(torch.equal(a, b) for a, b in zip(tree_leaves(same_state), tree_leaves(state), strict=True))
            raise KeyError
        assert torch.equal(run(mixer, given)[0], whole)
    with branch_off(mixer, "no such branch") as touched:
        assert touched == 0


@every_case
@torch.no_grad()
def test_initial_values_depend_on_name_and_seed_alone(case: Case):
    values = []
    for junk in range(2):
        torch.manual_seed(junk)
        mixer = case.mixer_class(case.mixer().config, case.mixer().shape)
        for parameter in mixer.parameters():
            parameter.fill_(float("nan"))
        mixer.initialise("model.layers.7.self_attn.mixer", seed=3)
        values.append(list(mixer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    assert all(x.isfinite().all() for x in values[0])
    assert set(mixer.inits()) == {name for name, _ in mixer.named_parameters()}
