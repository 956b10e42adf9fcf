"""Causal sliding-window softmax attention with optional sink tokens, and its constant-size state.

`window_attention` is banded (memory O(T * window)) and serves training, prefill and decoding: a state holds
the last `window` tokens, so rows continue where they stopped. `leaving` names the tokens that fall out of the
window at each step, for mixers whose other branch takes them over. `capped` bounds the scores, where the source
model bounds its own.
"""

from typing import Any

import torch
import torch.nn.functional as F

from linearize.ops.documents import positions
from linearize.ops.layout import check_inputs, expand_heads, working_dtype, zero_padding
from linearize.ops.window_state import State, advance, check_state, init_state, leaving

__all__ = ["State", "attend", "capped", "init_state", "leaving", "naive", "window_attention"]


def capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """softcap * tanh(scores / softcap): every score between -softcap and softcap; None leaves them as they are.

    The scores, of any shape, are already scaled and not yet masked. Gemma 2 (arXiv:2408.00118), section 2.
    Raises ValueError for a softcap that is not positive.
    """
    if softcap is None:
        return scores
    if softcap <= 0:
        raise ValueError(f"softcap must be positive, or None for scores without a bound, got {softcap:g}")
    return softcap * (scores / softcap).tanh()


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    scale: float,
    softcap: float | None = None,
    sinks: int = 0,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, max) of `window_attention` by definition: one T x T masked softmax, in any float dtype."""
    B, T, heads, _ = q.shape
    k, v = expand_heads(zero_padding(k, mask), heads), expand_heads(zero_padding(v, mask), heads)
    index = torch.arange(T, device=q.device)
    if documents is None:
        documents = torch.zeros(B, T, dtype=torch.int64, device=q.device)
    _, position = positions(documents)
    age = index[:, None] - index[None, :]
    seen = (age >= 0) & ((age < window) | (position[:, None, :] < sinks))
    seen = seen & (documents[:, :, None] == documents[:, None, :])
    if mask is not None:
        seen = (seen & mask[:, None, :] & mask[:, :, None]) | (age == 0)
    scores = capped(torch.einsum("bthd,bshd->bhts", q, k) * scale, softcap)
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1).transpose(1, 2), scores.amax(-1).transpose(1, 2)


def _blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """`[B, T, ...]` -> `[B, N, block, ...]`, zero-padded on the right."""
    pad = -x.shape[1] % block
    if pad:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
    return x.unflatten(1, (-1, block))


def _bands(x: torch.Tensor, prefix: torch.Tensor, block: int) -> torch.Tensor:
    """The tokens each block of queries can see: `[B, T, ...]` -> `[B, N, ..., span]`, a view of one padded
    copy.

    x follows prefix `[B, window, ...]`; band n starts window tokens before query block n, so span = window + block: one
    more than is ever seen, for the sake of rows that begin at even addresses.
    """
    joined = torch.cat([prefix, x], dim=1)
    pad = -x.shape[1] % block
    if pad:
        joined = F.pad(joined, (0, 0) * (x.dim() - 2) + (0, pad))
    return joined.unfold(1, prefix.shape[1] + block, block)


def _visible(
    window: int,
    block: int,
    valid: torch.Tensor,
    valid_prefix: torch.Tensor,
    documents: torch.Tensor | None,
) -> torch.Tensor:
    """Which tokens of its band each query sees: `[B, N, block, span]` bool."""
    age = torch.arange(block, device=valid.device)[:, None] + window
    age = age - torch.arange(window + block, device=valid.device)[None, :]
    seen = _bands(valid, valid_prefix, block)[:, :, None, :] & _blocks(valid, block)[..., None]
    if documents is not None:
        # Prefix tokens are never valid with documents (no state), so their number is arbitrary.
        keys = _bands(documents, documents.new_zeros(documents.shape[0], window), block)
        seen = seen & (_blocks(documents, block)[..., None] == keys[:, :, None, :])
    # A query always sees itself: padding, whose k and v are zero, then gets output 0 and a finite lse.
    return ((age >= 0) & (age < window) & seen) | (age == 0)


def _operands(x: torch.Tensor, heads: int, dim: int = 2) -> list[torch.Tensor]:
    """x with kv heads at dim, copied for the products with the query heads: one product of all of them, or on the CPU
    one each.

    Either way a product's operands are the same, in shape and in memory, whether the kv heads came grouped or expanded,
    so its bits are too; those of one product of all kv heads depend on how many there are and where each begins. On
    the CPU single products share their copies and fit its caches; on a GPU they would only be many launches.
    """
    if x.device.type != "cpu":
        groups = heads // x.shape[dim]
        return [x.clone(memory_format=torch.contiguous_format) if groups == 1 else x.repeat_interleave(groups, dim)]
    # Not `contiguous`, which leaves a single token's or block's head where it is, between those of other heads.
    copies = [head.clone(memory_format=torch.contiguous_format) for head in x.split(1, dim)]
    return [copies[head * len(copies) // heads] for head in range(heads)]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    sink: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    *,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax attention of blocks of c queries over their bands, with one query head per kv head.

    q `[B, N, H, c, D]` (scaled), k `[B, N, H, D, span]`, v `[B, N, H, span, V]`, visible `[B, N, c, span]`.
    sink: keys and values `[B, S, H, D]`, or `[B, N, c, S, H, D]` when each query has its own, and who sees
    them `[B, N, c, S]`. softcap bounds all scores, see `capped`.
    Returns out `[B, N, H, c, V]`, lse and max `[B, N, H, c]`.
    """
    scores = capped(q @ k, softcap) + _hidden(visible, q.dtype)
    span = scores.shape[-1]
    if sink is not None:
        keys, values, seen = sink
        axes = "bshd" if keys.dim() == 4 else "bncshd"
        sink_scores = capped(torch.einsum(f"bnhcd,{axes}->bnhcs", q, keys), softcap)
        scores = torch.cat([scores, sink_scores + _hidden(seen, q.dtype)], dim=-1)
    weights = scores.softmax(-1)
    top, best = scores.max(-1)
    out = weights[..., :span] @ v
    if sink is not None:
        out = out + torch.einsum(f"bnhcs,{axes}->bnhcd", weights[..., span:], values)
    return out, top - weights.gather(-1, best.unsqueeze(-1)).squeeze(-1).log(), top


def _hidden(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores `[B, N, H, c, S]` for visible `[B, N, c, S]`: 0, or -inf where it is False."""
    return torch.where(visible, 0.0, -torch.inf).to(dtype)[:, :, None]


def _sink_columns(
    k: torch.Tensor,
    v: torch.Tensor,
    after: State,
    *,
    window: int,
    block: int,
    position: torch.Tensor,
    start: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sink argument of `attend`: sinks are extra keys, seen once they have left the query's window.

    position `[B, T]` counts from the start of the stream, or of the document when start `[B, T]` is given.
    """
    slots = torch.arange(after["sink_k"].shape[1], device=k.device)
    seen = slots <= position[..., None] - window
    if mask is not None:
        seen = seen & mask[..., None]
    if start is None:
        return after["sink_k"].to(k.dtype), after["sink_v"].to(v.dtype), _blocks(seen, block)
    source = (start[..., None] + slots).clamp(max=k.shape[1] - 1)
    row = torch.arange(k.shape[0], device=k.device)[:, None, None]
    return _blocks(k[row, source], block), _blocks(v[row, source], block), _blocks(seen, block)


def step(
    q: torch.Tensor, after: State, mask: torch.Tensor | None, *, window: int, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One decoded token: q `[B, 1, Hq, K]` (scaled) against the ring that already holds its own key and value.

    Products are summed element by element, so that a head gives the same bits grouped or not and in any batch; softcap
    bounds the sums, see `capped`. Returns out `[B, 1, Hq, V]`, lse and max `[B, 1, Hq]`, as `window_attention` does.
    """
    keys, values, seen = after["k"], after["v"], after["valid"].clone()
    seen[:, -1] = True  # an empty row attends to a zero key instead of to nothing
    if "sink_k" in after:
        slots = torch.arange(after["sink_k"].shape[1], device=q.device)
        far = slots < after["seen"][:, None] - window  # sinks that have left the window
        keys, values = torch.cat([after["sink_k"], keys], dim=1), torch.cat([after["sink_v"], values], dim=1)
        seen = torch.cat([far, seen], dim=1)
    grouped = q[:, 0].unflatten(1, (keys.shape[2], -1)).unsqueeze(3)  # [B, Hkv, G, 1, K]
    keys, values = (x.to(q.dtype).transpose(1, 2).unsqueeze(2) for x in (keys, values))  # [B, Hkv, 1, W, D]
    scores = capped((grouped * keys).sum(-1), softcap).masked_fill(~seen[:, None, None], float("-inf"))
    top = scores.amax(-1)
    weights = (scores - top.detach().unsqueeze(-1)).exp()
    total = weights.sum(-1)
    out = (weights.unsqueeze(-1) * values).sum(-2) / total.unsqueeze(-1)
    out, lse, top = (x.flatten(1, 2).unsqueeze(1) for x in (out, total.log() + top.detach(), top))
    return (out if mask is None else out * mask[..., None, None]), lse, top


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    scale: float,
    softcap: float | None = None,
    sinks: int = 0,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    state: State | None = None,
    return_max: bool = False,
) -> tuple[Any, ...]:
    """Softmax over the last `window` tokens, the query's own included, and its document's first `sinks`
    tokens.

    q `[B, T, Hq, K]`, k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]`; window and sinks in tokens; scale multiplies q
    . k, and softcap bounds the products, those of sinks too (`capped`; None: no bound); mask `[B, T]` bool, real tokens
    first in each row; documents `[B, T]` int, non-decreasing; state from `init_state` or a former call (None: the rows
    start here). Sinks: Xiao et al. 2023, arXiv 2309.17453.

    Returns (out, lse, state), or (out, lse, max, state) with return_max. out `[B, T, Hq, V]` is in v's dtype,
    0 at padding; lse and max `[B, T, Hq]`, the logsumexp and the largest of a row's scores, are float32 (float64 for
    float64 inputs), differentiable and finite; where several scores are the largest, the gradient of max is that of one
    of them. Scores are computed in that precision too. With documents the state is that of the row's last document.
    Raises ValueError for shapes that do not fit, documents with a state, a state of other sizes, or a softcap that is
    not positive.
    """
    check_inputs("window_attention", q, k, v, mask=mask, documents=documents, state=state)
    check_state(window, sinks, state)
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"window_attention: k has {k.shape[2]} heads and v {v.shape[2]}; they must have the same")
    B, T, heads, kv_heads = *q.shape[:3], k.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        k, v = zero_padding(k, mask), zero_padding(v, mask)
        if state is None:
            kept = torch.promote_types(k.dtype, v.dtype)
            state = init_state(B, window, sinks, kv_heads, k.shape[-1], v.shape[-1], kept, k.device)
        after = advance(state, k, v, mask, documents)
        dtype, out_dtype = working_dtype(q, k, v), v.dtype
        if T == 1 and documents is None:
            out, lse, top = step(q.to(dtype) * scale, after, mask, window=window, softcap=softcap)
            return (out.to(out_dtype), lse, top, after) if return_max else (out.to(out_dtype), lse, after)
        q, k, v = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
        block = min(T, 64, max(16, window))
        valid = k.new_ones(B, T, dtype=torch.bool) if mask is None else mask
        visible = _visible(window, block, valid, state["valid"], documents)
        sink = None
        if sinks:
            start, position = None, state["seen"][:, None] + torch.arange(T, device=k.device)
            if documents is not None:
                start, position = positions(documents)
            sink = _sink_columns(k, v, after, window=window, block=block, position=position, start=start, mask=mask)
        k_bands = _operands(_bands(k, state["k"].to(dtype), block).mT, heads)
        v_bands = _operands(_bands(v, state["v"].to(dtype), block).mT, heads)
        queries = _blocks(q, block).transpose(2, 3).split(heads // len(k_bands), dim=2)
        own: list[Any] = [None] * len(k_bands)
        if sink is not None:
            own = [(*x, sink[2]) for x in zip(*(_operands(x, heads, dim=x.dim() - 2) for x in sink[:2]), strict=True)]
        results = [
            attend(query, k_band.mT, v_band, visible, columns, softcap=softcap)
            for query, k_band, v_band, columns in zip(queries, k_bands, v_bands, own, strict=True)
        ]
        parts = (torch.cat(part, dim=2) for part in zip(*results, strict=True))
        out, lse, top = (part.transpose(2, 3).flatten(1, 2)[:, :T] for part in parts)
        out = out.to(out_dtype)
        return (out, lse, top, after) if return_max else (out, lse, after)
