"""Sliding-window attention against the T x T definition, its state against the whole row, and what leaves
it.
"""

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    as_leaves,
    assert_close,
    document_rows,
    gradients,
    random_splits,
    right_padding,
)

from linearize.ops.layout import expand_heads
from linearize.ops.window import init_state, leaving, naive, window_attention

SCALE = 0.9
every_cap = pytest.mark.parametrize("softcap", [None, 1.5])
"""Scores have a standard deviation of about 2.5, so that the cap bends most of them."""


def qkv(B: int, T: int, heads: int = 4, kv_heads: int = 2, seed: int = 0, K: int = 8, V: int = 6) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(B, T, heads, K), torch.randn(B, T, kv_heads, K), torch.randn(B, T, kv_heads, V)]


def attend(inputs: list[torch.Tensor], window: int, sinks: int = 0, **options):
    """([out, lse, max], state)"""
    *results, state = window_attention(*inputs, window=window, scale=SCALE, sinks=sinks, return_max=True, **options)
    return results, state


def truth(inputs: list[torch.Tensor], window: int, sinks: int = 0, **options) -> list[torch.Tensor]:
    return list(naive(*(x.double() for x in inputs), window=window, scale=SCALE, sinks=sinks, **options))


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("window", [1, 5, 64, 100, 300])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 100])
@every_cap
def test_forward_equals_definition(T: int, window: int, sinks: int, softcap: float | None):
    inputs = qkv(2, T)
    results, _ = attend(inputs, window, sinks, softcap=softcap)
    assert all(x.dtype == torch.float32 for x in results)
    assert_close(results, truth(inputs, window, sinks, softcap=softcap), 1e-5)
    assert softcap is None or results[2].abs().max() <= softcap


def test_forward_equals_definition_on_long_rows():
    inputs = qkv(1, 1000)
    assert_close(attend(inputs, 64, 4)[0], truth(inputs, 64, 4), 1e-5)


def test_definition_is_causal_softmax_when_the_window_holds_everything():
    q, k, v = (x.double() for x in qkv(2, 50, kv_heads=4))
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=SCALE)
    out, lse, top = naive(q, k, v, window=50, scale=SCALE)
    assert_close([out], [expected.transpose(1, 2)], 1e-12)
    assert_close([lse[:, :1], top[:, :1]], [SCALE * (q * k).sum(-1)[:, :1]] * 2, 1e-12)


def test_definition_sees_exactly_window_and_sinks():
    T, window, sinks = 12, 3, 2
    documents = document_rows([[8, 4]])
    v = torch.eye(T, dtype=torch.float64)[None, :, None, :]
    q = k = torch.zeros(1, T, 1, 4, dtype=torch.float64)
    out, lse, _ = naive(q, k, v, window=window, scale=1.0, sinks=sinks, documents=documents)
    expected = {0: {0}, 2: {0, 1, 2}, 3: {0, 1, 2, 3}, 7: {0, 1, 5, 6, 7}, 8: {8}, 11: {8, 9, 10, 11}}
    for t, keys in expected.items():
        assert set(out[0, t, 0].nonzero().flatten().tolist()) == keys
        assert lse[0, t, 0].exp().item() == pytest.approx(len(keys))


@pytest.mark.parametrize(("T", "window", "sinks"), [(1, 4, 1), (65, 16, 3), (100, 64, 0), (40, 64, 2)])
@every_cap
def test_gradients_equal_definition(T: int, window: int, sinks: int, softcap: float | None):
    inputs = qkv(2, T)
    mask, documents = right_padding([T, max(T - 7, 1)], T), document_rows([[T], [T]])
    documents[:, T // 3 :] += 1
    leaves, exact = as_leaves(inputs, torch.float32), as_leaves(inputs, torch.float64)
    for options in ({}, {"mask": mask}, {"documents": documents}, {"mask": mask, "documents": documents}):
        results = attend(leaves, window, sinks, softcap=softcap, **options)[0]
        expected = truth(exact, window, sinks, softcap=softcap, **options)
        assert_close(results, expected, 1e-5)
        assert_close(gradients(results, leaves), gradients(expected, exact), 1e-4)


@pytest.mark.parametrize("window", [1, 6, 64])
@pytest.mark.parametrize("sinks", [0, 3])
@every_cap
def test_prefill_in_pieces_and_steps_equals_one_call(window: int, sinks: int, softcap: float | None):
    T = 80
    inputs = qkv(2, T)
    whole, whole_state = attend(inputs, window, sinks, softcap=softcap)
    for lengths in ([1] * T, random_splits(T, 0), random_splits(T, 1)):
        state, pieces = None, []
        for piece in zip(*(x.split(lengths, dim=1) for x in inputs), strict=True):
            results, state = attend(list(piece), window, sinks, softcap=softcap, state=state)
            pieces.append(results)
        assert_close([torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True)], whole, 1e-5)
        assert state.keys() == whole_state.keys()
        assert all(torch.equal(state[name], whole_state[name]) for name in state)


@pytest.mark.parametrize("window", [1, 6, 30])
def test_masked_pieces_equal_each_row_alone(window: int):
    sinks, lengths = 3, torch.tensor([[0, 9, 1, 20], [2, 0, 1, 25], [7, 12, 0, 3]])
    rows = qkv(3, 40)
    taken = torch.zeros(3, dtype=torch.int64)
    state, outputs = init_state(3, window, sinks, 2, 8, 6, torch.float32, "cpu"), []
    for n in lengths.T:
        T = max(int(n.max()), 1)
        index = (taken[:, None] + torch.arange(T)).clamp(max=39)
        piece = [x[torch.arange(3)[:, None], index] for x in rows]
        mask = right_padding(n.tolist(), T)
        results, state = attend(piece, window, sinks, state=state, mask=mask)
        assert not results[0][~mask].any() and all(x.isfinite().all() for x in results)
        outputs.append((results, mask))
        taken = taken + n
    for row in range(3):
        total = int(taken[row])
        alone, alone_state = attend([x[row : row + 1, :total] for x in rows], window, sinks)
        joined = [torch.cat([r[i][row][mask[row]] for r, mask in outputs])[None] for i in range(3)]
        assert_close(joined, alone, 1e-5)
        assert state["seen"][row] == total
        for name in state:
            assert torch.equal(state[name][row], alone_state[name][0]), name


def test_padded_step_leaves_state_bit_identical():
    for sinks in (0, 8):
        _, state = attend(qkv(2, 5), 4, sinks)
        _, after = attend(qkv(2, 1, seed=1), 4, sinks, state=state, mask=torch.tensor([[True], [False]]))
        for name, before in state.items():
            assert torch.equal(after[name][1], before[1]), name
        assert not torch.equal(after["k"][0], state["k"][0]) and after["seen"].tolist() == [6, 5]


def test_state_has_constant_size_and_holds_the_last_tokens():
    q, k, v = qkv(2, 9)
    _, state = attend([q, k, v], 4, 2)
    fresh = init_state(2, 4, 2, 2, 8, 6, torch.float32, "cpu")
    assert {name: x.shape for name, x in state.items()} == {name: x.shape for name, x in fresh.items()}
    assert torch.equal(state["k"], k[:, -4:]) and torch.equal(state["sink_v"], v[:, :2])
    _, short = attend([x[:, :3] for x in (q, k, v)], 4, 2)
    assert torch.equal(short["k"][:, 1:], k[:, :3]) and short["valid"].tolist() == [[False, True, True, True]] * 2
    assert "sink_k" not in attend([q, k, v], 4, 0)[1]


@pytest.mark.parametrize("T", [40, 100])
def test_documents_equal_each_document_alone(T: int):
    window, sinks, rows = 16, 3, [[20, 1, T - 21], [T - 2, 2]]
    inputs = qkv(2, T)
    results, state = attend(inputs, window, sinks, documents=document_rows(rows))
    next_token = qkv(2, 1, seed=5)
    following, _ = attend(next_token, window, sinks, state=state)
    for row, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            part = (slice(row, row + 1), slice(start, start + length))
            alone, alone_state = attend([x[part] for x in inputs], window, sinks)
            assert_close([x[part] for x in results], alone, 1e-5)
            start += length
        after, _ = attend([x[row : row + 1] for x in next_token], window, sinks, state=alone_state)
        assert_close([x[row : row + 1] for x in following], after, 1e-5)


def test_last_document_continues_behind_padding():
    documents, mask = document_rows([[30, 12]]), right_padding([37], 42)
    inputs, next_token = qkv(1, 42), qkv(1, 1, seed=5)
    _, state = attend(inputs, 16, 3, documents=documents, mask=mask)
    _, alone_state = attend([x[:, 30:37] for x in inputs], 16, 3)
    assert_close(attend(next_token, 16, 3, state=state)[0], attend(next_token, 16, 3, state=alone_state)[0], 1e-6)


@every_cap
@pytest.mark.parametrize(("K", "V"), [(8, 6), (31, 25), (64, 64)])
@pytest.mark.parametrize(("B", "heads", "kv_heads"), [(2, 6, 2), (1, 4, 1), (1, 14, 2)])
@pytest.mark.parametrize("T", [1, 13, 17, 50, 70])
def test_grouped_heads_equal_expanded_heads_bit_for_bit(
    T: int, B: int, heads: int, kv_heads: int, K: int, V: int, softcap: float | None
):
    """Sizes at which torch's products of many matrices depend on how many they are, or on where they begin."""
    q, k, v = qkv(B, T, heads, kv_heads, K=K, V=V)
    documents = document_rows([[T // 3 + 1, T - T // 3 - 1]] * B) if T > 1 else None
    for window, sinks in ((5, 1), (16, 2), (64, 0), (100, 3)):
        _, state = attend([q, k, v], window, sinks, softcap=softcap)
        wide = {name: expand_heads(x, heads) if x.dim() == 4 else x for name, x in state.items()}
        for grouped, expanded in (
            ({}, {}),
            ({"state": state}, {"state": wide}),
            ({"documents": documents}, {"documents": documents}),
        ):
            results, _ = attend([q, k, v], window, sinks, softcap=softcap, **grouped)
            others, _ = attend(
                [q, expand_heads(k, heads), expand_heads(v, heads)], window, sinks, softcap=softcap, **expanded
            )
            assert all(torch.equal(x, y) for x, y in zip(results, others, strict=True))


@pytest.mark.parametrize("changed", [0, 15, 16, 40])
def test_no_output_depends_on_later_tokens(changed: int):
    inputs = as_leaves(qkv(1, 41), torch.float32)
    results, _ = attend(inputs, 16, 2)
    others = [x.detach().clone() for x in inputs]
    for x in others:
        x[:, changed] -= 1.0
    moved, _ = attend(others, 16, 2)
    assert all(torch.equal(x[:, :changed], y[:, :changed]) for x, y in zip(results, moved, strict=True))
    assert not torch.equal(results[0][:, changed:], moved[0][:, changed:])
    for grad in torch.autograd.grad(sum(x[:, changed].sum() for x in results), inputs):
        assert not grad[:, changed + 1 :].any()


def test_bfloat16_is_finite_and_close_and_scores_are_float32():
    leaves = as_leaves([10 * x for x in qkv(1, 200)], torch.bfloat16)
    results, _ = attend(leaves, 32, 2)
    expected = truth([x.detach() for x in leaves], 32, 2)
    assert results[0].dtype == torch.bfloat16 and results[1].dtype == torch.float32
    assert_close(results[:1], expected[:1], 1e-2)
    assert_close(results[1:], expected[1:], 1e-5)
    assert all(x.isfinite().all() for x in gradients(results, leaves))


def test_autocast_does_not_lower_the_precision():
    inputs = qkv(1, 40)
    plain, _ = attend(inputs, 16, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, _ = attend(inputs, 16, 2)
    assert all(torch.equal(x, y) for x, y in zip(under_autocast, plain, strict=True))


def test_memory_grows_with_the_window_not_with_the_square_of_the_row():
    largest = 0

    def note(x: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return x

    T, window = 2048, 16
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        attend(as_leaves(qkv(1, T), torch.float32), window)
    assert 0 < largest <= T * 8 * window


def _leaving_by_hand(T: int, window: int, sinks: int, start: int = 0) -> list[int]:
    """The index in the row that leaves at each of T steps from `start`, or -1."""
    return [t - window if t - window >= sinks else -1 for t in range(start, start + T)]


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 3), (30, 2)])
def test_leaving_names_the_tokens_that_fall_out(window: int, sinks: int):
    T = 24
    q, k, v = qkv(2, T)
    for lengths in ([T], [1] * T, random_splits(T, 0)):
        state, start = None, 0
        for n in lengths:
            piece = [x[:, start : start + n] for x in (q, k, v)]
            k_out, v_out, valid = leaving(*piece[1:], window=window, sinks=sinks, state=state)
            assert k_out.shape == piece[1].shape and v_out.shape == piece[2].shape
            for t, source in enumerate(_leaving_by_hand(n, window, sinks, start)):
                assert valid[:, t].tolist() == [source >= 0] * 2
                if source >= 0:
                    assert torch.equal(k_out[:, t], k[:, source]) and torch.equal(v_out[:, t], v[:, source])
            _, state = attend(piece, window, sinks, state=state)
            start += n


def test_leaving_respects_padding_and_documents():
    k = torch.arange(12.0).reshape(1, 12, 1, 1)
    documents = document_rows([[7, 5]])
    k_out, _, valid = leaving(k, k, window=3, sinks=1, documents=documents, mask=right_padding([11], 12))
    left = {t: int(k_out[0, t]) for t in range(12) if valid[0, t]}
    assert left == {4: 1, 5: 2, 6: 3}
    _, _, valid = leaving(k, k, window=2, sinks=1, documents=documents, mask=right_padding([11], 12))
    assert valid[0].nonzero().flatten().tolist() == [3, 4, 5, 6, 10]


def test_window_and_leaving_together_cover_every_token_once():
    T, window, sinks = 40, 7, 2
    q, k, _ = qkv(1, T, heads=1, kv_heads=1)
    v = torch.eye(T)[None, :, None, :]
    documents = document_rows([[25, 15]])
    out, *_ = window_attention(q, k, v, window=window, scale=SCALE, sinks=sinks, documents=documents)
    _, v_out, valid = leaving(k, v, window=window, sinks=sinks, documents=documents)
    local = (out[0, :, 0] > 0).long()
    gone = (v_out * valid[..., None, None])[0, :, 0].cumsum(0).long()
    gone = gone * (documents[0][:, None] == documents[0][None, :])
    expected = torch.ones(T, T).tril().long() * (documents[0][:, None] == documents[0][None, :])
    assert torch.equal(local + gone, expected)


def test_step_compiles_without_graph_breaks():
    _, state = attend(qkv(2, 9), 4, 2)
    inputs, mask = qkv(2, 1, seed=3), torch.tensor([[True], [False]])

    def step(inputs, state, mask):
        k_out, _, valid = leaving(*inputs[1:], window=4, sinks=2, state=state, mask=mask)
        results, after = attend(inputs, 4, 2, state=state, mask=mask)
        return results, after, k_out, valid

    for given in (None, mask):
        results, after, k_out, valid = step(inputs, state, given)
        compiled = torch.compile(step, backend="eager", fullgraph=True)(inputs, state, given)
        assert_close(compiled[0], results, 1e-6)
        assert all(torch.equal(compiled[1][name], after[name]) for name in after)
        assert torch.equal(compiled[2], k_out) and torch.equal(compiled[3], valid)


def test_impossible_arguments_are_refused():
    inputs = qkv(2, 8)
    _, state = attend(inputs, 4, 2)
    with pytest.raises(ValueError, match="made for window=4, sinks=2, the call asks for window=5, sinks=2"):
        attend(inputs, 5, 2, state=state)
    with pytest.raises(ValueError, match="documents cannot be combined with an incoming state"):
        attend(inputs, 4, 2, state=state, documents=document_rows([[8], [8]]))
    with pytest.raises(ValueError, match="documents cannot be combined with an incoming state"):
        leaving(*inputs[1:], window=4, sinks=2, state=state, documents=document_rows([[8], [8]]))
    with pytest.raises(ValueError, match=r"window must be at least 1 .* got window=0"):
        attend(inputs, 0)
