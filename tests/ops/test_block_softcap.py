"""`block_attention` with capped scores, softcap * tanh(score / softcap), against its T x T definition in float64."""

import pytest
import torch
from op_cases import as_leaves, assert_close, gradients, random_splits

from linearize.ops.block_attention import block_attention
from linearize.ops.layout import expand_heads

SCALE, CAP = 0.9, 1.5
"""Scores have a standard deviation of about 2.5, so that the cap bends most of them."""

sizes = pytest.mark.parametrize(("block", "back", "bank"), [(8, 0, 0), (5, 2, 0), (8, 1, 0), (8, 1, 5), (1, 1, 2)])


def inputs(B: int, T: int, heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    """q, k, v and phi(q); phi(k) is exp(k / 2)."""
    torch.manual_seed(0)
    qkv = [torch.randn(B, T, heads, 8), torch.randn(B, T, kv_heads, 8), torch.randn(B, T, kv_heads, 6)]
    return [*qkv, torch.rand(B, T, heads, 8)]


def features(k: torch.Tensor) -> torch.Tensor:
    return (k / 2).exp()


def attend(given: list[torch.Tensor], block: int, back: int, bank: int, softcap: float | None = CAP, state=None):
    """([out, lse, peak, num, den], state)"""
    read, after = block_attention(
        *given, features, block=block, back=back, bank=bank, scale=SCALE, softcap=softcap, state=state
    )
    return list(read), after


def truth(given: list[torch.Tensor], block: int, back: int, bank: int, softcap: float | None) -> list[torch.Tensor]:
    """The same from one T x T matrix of scores, with the tokens that each query sees marked in it."""
    q, k, v, phi_q = (x.double() for x in given)
    T, k, v = q.shape[1], expand_heads(k, q.shape[2]), expand_heads(v, q.shape[2])
    scores = torch.einsum("bthk,bshk->bhts", q, k) * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(T)
    age = place[:, None] - place
    first = ((place // block - back).clamp(min=0) * block)[:, None]  # of the tokens in reach
    seen = (age >= 0) & (place >= first)
    if bank:
        window = scores.masked_fill((age < 0) | (age >= block), float("-inf")).softmax(-1)
        saliency = window.sum(-2, keepdim=True).float().expand_as(scores)
        order = saliency.masked_fill(place >= first, -1.0).argsort(dim=-1, descending=True, stable=True)[..., :bank]
        seen = seen | torch.zeros_like(scores).scatter(-1, order, 1.0).bool() & (place < first)
    linear = torch.einsum("bthf,bshf->bhts", phi_q, features(k)) * ((age >= 0) & ~seen)
    exact = scores.masked_fill(~seen, float("-inf"))
    out, num = (torch.einsum("bhts,bshv->bthv", w, v) for w in (exact.softmax(-1), linear))
    return [out, *(x.mT for x in (exact.logsumexp(-1), exact.amax(-1))), num, linear.sum(-1).mT]


@sizes
@pytest.mark.parametrize("softcap", [None, CAP])
@pytest.mark.parametrize("T", [1, 61])
def test_values_and_gradients_equal_the_definition(T: int, block: int, back: int, bank: int, softcap: float | None):
    given = inputs(2, T)
    leaves, exact = as_leaves(given, torch.float32), as_leaves(given, torch.float64)
    results, _ = attend(leaves, block, back, bank, softcap)
    expected = truth(exact, block, back, bank, softcap)
    assert_close(results, expected, 1e-5)
    assert_close(gradients(results, leaves), gradients(expected, exact), 1e-4)


@sizes
def test_pieces_and_steps_equal_one_call(block: int, back: int, bank: int):
    T = 61
    given = inputs(2, T)
    whole, whole_state = attend(given, block, back, bank)
    for lengths in ([1] * T, random_splits(T, 0)):
        state, pieces = None, []
        for piece in zip(*(x.split(lengths, dim=1) for x in given), strict=True):
            results, state = attend(list(piece), block, back, bank, state=state)
            pieces.append(results)
        assert_close([torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True)], whole, 1e-5)
        assert_close([state[name] for name in whole_state], list(whole_state.values()), 1e-5)
        assert torch.equal(state["local"], whole_state["local"])
        assert not bank or torch.equal(state["bank"], whole_state["bank"])


@sizes
@pytest.mark.parametrize("T", [1, 13, 17, 50, 61])
@pytest.mark.parametrize(("B", "kv_heads"), [(1, 1), (2, 2)])
def test_grouped_heads_equal_expanded_heads_bit_for_bit(
    B: int, kv_heads: int, T: int, block: int, back: int, bank: int
):
    q, k, v, phi_q = inputs(B, T, kv_heads=kv_heads)
    grouped, _ = attend([q, k, v, phi_q], block, back, bank)
    expanded, _ = attend([q, expand_heads(k, 4), expand_heads(v, 4), phi_q], block, back, bank)
    assert all(torch.equal(x, y) for x, y in zip(grouped, expanded, strict=True))


@sizes
def test_without_a_cap_nothing_changes(block: int, back: int, bank: int):
    given = inputs(2, 61)
    options = {"block": block, "back": back, "bank": bank, "scale": SCALE}
    plain, state = block_attention(*given, features, **options)
    results, after = attend(given, block, back, bank, softcap=None)
    assert all(torch.equal(x, y) for x, y in zip(results, plain, strict=True))
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_the_cap_changes_who_is_salient():
    given = inputs(2, 61)
    with_cap, without = (attend(given, 8, 1, 5, softcap)[1]["bank"] for softcap in (CAP, None))
    assert not torch.equal(with_cap, without)


def test_impossible_caps_are_refused():
    with pytest.raises(ValueError, match=r"softcap must be positive, or None .* got 0"):
        attend(inputs(1, 5), 4, 0, 0, softcap=0.0)
