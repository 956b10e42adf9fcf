"""Log-linear attention: the past of a token in buckets of growing size, each a state with a weight of its own.

Source: Guo et al. 2025, arXiv 2506.04761, section 3 (Fenwick levels), on Mamba-2 (`simple_gla` here) and on Gated
DeltaNet (`delta_rule`). Seen from token t, token s (positions in the row, from 0) has the level 0 if s == t, else the
number of bits of t XOR s; the last of L levels takes all that lies further away, so that the state is constant.
`log_linear` is the operator; no exponent is ever positive.
"""

import torch
import torch.nn.functional as F

from linearize.ops.layout import from_chunks, to_chunks
from linearize.ops.recurrence import Gate, Recurrence, run
from linearize.ops.simple_gla import segment_sums

State = tuple[torch.Tensor, torch.Tensor]
Result = tuple[torch.Tensor, State]

MOST_LEVELS = 64
"""Positions are int64."""


def fenwick_level(apart: torch.Tensor, levels: int) -> torch.Tensor:
    """The level of a token from another one, for their positions' XOR: its number of bits, at most levels - 1."""
    borders = torch.ones(levels - 1, dtype=torch.int64, device=apart.device) << torch.arange(
        levels - 1, device=apart.device
    )
    return torch.bucketize(apart, borders, right=True)


def later_levels(now: torch.Tensor, then: torch.Tensor, levels: int) -> torch.Tensor:
    """`[..., levels]`: where the buckets that position `now` sees in levels 0, 1, ... are for the position `then`.

    now, then `[...]`, then >= now. A bucket never splits, so one of its tokens stands for all: bucket l begins at `now`
    with its last l bits cleared. Nor does it ever descend: taking the larger level changes nothing for it, keeps the
    last level where it is, and treats a state with something in a bucket that should be empty as the token loop does.
    """
    held = torch.arange(levels, device=now.device)
    begin = (now.unsqueeze(-1) >> held) << held
    return torch.maximum(held, fenwick_level(then.unsqueeze(-1) ^ begin, levels))


def _start(q: torch.Tensor, v: torch.Tensor, levels: torch.Tensor, state: State | None) -> State:
    if state is not None:
        return state
    B, _, H, K = q.shape
    return q.new_zeros(B, H, levels.shape[-1], K, v.shape[-1]), torch.zeros(B, dtype=torch.int64, device=q.device)


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: Gate,
    levels: torch.Tensor,
    beta: Gate,
    present: torch.Tensor,
    *,
    state: State | None,
) -> Result:
    """Token by token, also for decoding; the buckets of the state are those that the next token sees.

    A token changes all buckets by the same transition, is written into level 0, and reads. For the token after it, all
    levels up to the one that it has from there become one bucket (a binary counter's carry).
    """
    S, seen = _start(q, v, levels, state)
    L, outs = levels.shape[-1], []
    level = torch.arange(L, device=q.device).view(L, 1, 1)
    for t in range(q.shape[1]):
        if g is not None:
            S = g[:, t].exp()[..., None, None, None] * S
        write = k[:, t]
        if beta is not None:
            write = beta[:, t].unsqueeze(-1) * write
            S = S - write[:, :, None, :, None] * (k[:, t, :, None, None] @ S)
        token = write.unsqueeze(-1) * v[:, t].unsqueeze(-2)
        S = torch.cat([S[:, :, :1] + token.unsqueeze(2), S[:, :, 1:]], dim=2)
        read = (levels[:, t].unsqueeze(-1) * q[:, t].unsqueeze(-2)).flatten(-2)
        outs.append((read.unsqueeze(-2) @ S.flatten(2, 3)).squeeze(-2))
        before, seen = seen, seen + present[:, t, 0].long()
        into = fenwick_level(before ^ seen, L).view(-1, 1, 1, 1, 1)  # 0 for padding, which moves nothing
        carried = torch.where(level <= into, S, 0).sum(2, keepdim=True)
        S = torch.where(level > into, S, torch.where(level == into, carried, 0))
    return torch.stack(outs, dim=1), (S, seen)


def _within(
    q: torch.Tensor, k: torch.Tensor, g: torch.Tensor, beta: Gate
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What chunks do to values and states, whatever the levels; q, k `[B, H, N, c, K]`, g and beta `[B, H, N, c]`.

    Returns scores `[..., c, c]`, by which query i reads the value of token j; reads `[..., c, K]`, by which it reads a
    state from before the chunk; keys `[..., c, K]`, under which a state after the chunk holds value j; and what the
    chunk makes of a state: a factor `[..., 1, 1]` or, for the delta rule, a matrix `[..., K, K]`.
    """
    between = segment_sums(g).exp()
    from_start, to_end = g.cumsum(-1).exp().unsqueeze(-1), between[..., -1, :].unsqueeze(-1)
    scores, reads, keys, decay = q @ k.transpose(-1, -2) * between, q * from_start, k * to_end, from_start[..., -1:, :]
    if beta is None:
        return scores, reads, keys, decay
    # What token i writes is sum_j mixed_ij v_j - (mixed (from_start k))_i S: the UT transform, as in ops/delta.py. The
    # solver takes the diagonal for ones and what is above it for zeros, whatever is there.
    overlaps = beta.unsqueeze(-1) * (k @ k.transpose(-1, -2)) * between
    mixed = torch.linalg.solve_triangular(overlaps, torch.diag_embed(beta), upper=False, unitriangular=True)
    erased = mixed @ (from_start * k)
    identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    transition = decay * identity - keys.transpose(-1, -2) @ erased
    return scores @ mixed, reads - scores @ erased, mixed.transpose(-1, -2) @ keys, transition


def chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: Gate,
    levels: torch.Tensor,
    beta: Gate,
    present: torch.Tensor,
    *,
    state: State | None,
    chunk_size: int,
) -> Result:
    """The same by chunks (arXiv 2506.04761, section 3), whatever the position at which each row goes on.

    Within a chunk the weight of a token's level multiplies its score. A bucket from before is read as a whole, with the
    weight of the level that the query finds it in, and moves at the chunk's end to the level that the next token sees.
    """
    T, L, (S, seen) = q.shape[1], levels.shape[-1], _start(q, v, levels, state)
    g = q.new_zeros(1, T, 1) if g is None else g
    q, k, v, g, levels = (to_chunks(x, chunk_size) for x in (q, k, v, g, levels))
    scores, reads, keys, transition = _within(q, k, g, None if beta is None else to_chunks(beta, chunk_size))
    # Real tokens come first in a row, so only the ends of chunks must know where they stop.
    index = torch.arange(q.shape[2] * chunk_size, device=q.device).unflatten(0, (-1, chunk_size))
    position = index.unsqueeze(0) if state is None else index + seen[:, None, None]  # [1 or B, N, c]
    real = present[..., 0].long().sum(1, keepdim=True)
    ends = seen[:, None] + torch.minimum(index[:, -1] + 1, real)
    starts = torch.cat([seen[:, None], ends[:, :-1]], dim=1)

    def weights(level: torch.Tensor) -> torch.Tensor:
        """Each query's weights of levels `[1 or B, N, c, ...]`."""
        return levels.gather(-1, level.unsqueeze(1).expand(*levels.shape[:2], -1, -1, -1))

    own = weights(fenwick_level(position.unsqueeze(-1) ^ position.unsqueeze(-2), L))
    old = weights(later_levels(starts.unsqueeze(-1), position, L))
    moves = F.one_hot(later_levels(starts, ends, L), L).transpose(-1, -2).to(S.dtype)  # [B, N, L after, L before]
    enters = F.one_hot(fenwick_level(ends.unsqueeze(-1) ^ position, L), L).to(S.dtype)  # [B, N, c, L]
    outs = []
    for n in range(q.shape[2]):
        read = (old[:, :, n].unsqueeze(-1) * reads[:, :, n].unsqueeze(-2)).flatten(-2)
        outs.append(read @ S.flatten(2, 3))
        change = transition[:, :, n].unsqueeze(2)
        S = change * S if beta is None else change @ S
        key = (enters[:, None, n].unsqueeze(-1) * keys[:, :, n].unsqueeze(-2)).flatten(-2)
        written = key.transpose(-1, -2) @ v[:, :, n]
        S = (moves[:, None, n] @ S.flatten(3)).view_as(S) + written.view_as(S)
    out = (scores * own) @ v + torch.stack(outs, dim=2)
    return from_chunks(out, T), (S, ends[:, -1])


# fla 0.6 has chunk_log_linear_attn for the form without beta. Its levels are these, but it returns the buckets of whole
# chunks of 64 tokens and the raw inputs of the rest, of which this state cannot be made, has no gradients for a call
# that continues one, and knows no last level that takes the rest: no kernel.
LOG_LINEAR = Recurrence("log_linear", naive, chunk, naive, resets=False)


def log_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    levels: torch.Tensor,
    beta: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    state: State | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Result:
    """y_t = scale * sum_l levels_tl q_t S_t^l, where the S^l sum to the state of `simple_gla` or, with beta, of
    `delta_rule`: S_t^l holds what the tokens of level l (see the module) have written (arXiv 2506.04761).

    q `[B, T, Hq, K]`, k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]`; g log-decay <= 0, `[B, T, H]`, or None for no decay;
    levels `[B, T, H, L]` weights >= 0 of the levels, nearest first (the last one takes all outside the aligned block of
    2 ** (L - 2) tokens around t); beta `[B, T, H]` in (0, 1) or (0, 2), with k of unit norm, or None: no delta rule;
    H is Hq or Hkv. scale defaults to K ** -0.5; mask `[B, T]` bool, real tokens first in each row; documents `[B, T]`
    int, non-decreasing, each with positions of its own; state as returned; chunk_size in tokens, a power of two.
    Returns y `[B, T, Hq, V]` in v's dtype and the state (S `[B, Hq, L, K, V]` in float32, float64 for float64 inputs;
    seen `[B]` int64, real tokens so far); with documents it is that of the row's last document. Padding changes no
    state; y at padding carries no meaning.
    Raises ValueError for shapes that do not fit, documents with a state, or a backend that cannot be met.
    """
    for name, gate in (("g", g), ("beta", beta)):
        if gate is not None and gate.dim() != 3:
            raise ValueError(f"log_linear: {name} must be [B, T, H], got {tuple(gate.shape)} beside q {tuple(q.shape)}")
    if levels.dim() != 4 or not 1 <= levels.shape[3] <= MOST_LEVELS:
        raise ValueError(f"log_linear: levels must be [B, T, H, L], 1 <= L <= {MOST_LEVELS}, got {tuple(levels.shape)}")
    if state is not None and state[0].shape[2] != levels.shape[3]:
        raise ValueError(f"log_linear: the state has {state[0].shape[2]} levels, the call {levels.shape[3]}")
    out, state = run(
        LOG_LINEAR,
        q,
        k,
        v,
        (g, levels, beta, q.new_ones(*q.shape[:2], 1)),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        mask=mask,
        documents=documents,
        state=state,
        chunk_size=chunk_size,
        backend=backend,
    )
    return out.to(v.dtype), state
