"""Gated linear attention with one decay per key channel and token (GLA, Yang et al. 2023, arXiv 2312.06635).

`gla` is the operator; the log-decay g <= 0 may be as strong as the caller likes: no exponent is ever
positive.
"""

import torch

from linearize.ops.backend import fla_kernel
from linearize.ops.layout import from_chunks, read_out, to_chunks
from linearize.ops.recurrence import Recurrence, run

Result = tuple[torch.Tensor, torch.Tensor]


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, *, state: torch.Tensor | None) -> Result:
    """The recurrence, token by token: S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, y_t = q_t S_t."""
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state
    outs = []
    for t in range(T):
        S = g[:, t].exp()[..., None] * S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outs, dim=1), S


def decayed_scores(
    q: torch.Tensor, k: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scores_ij = sum_d q_id k_jd exp(g_{j+1,d} + ... + g_id) for i >= j, else 0; q, k, g `[..., c, K]`, c =
    2^n.

    Blocks are merged pairwise, from single tokens to the whole chunk. The scores of a later block's queries
    against the earlier block's keys are one product of q decayed since the border and k decayed up to it:
    both exponents are sums of g, so never positive, and nothing cancels, however strong the decay (GLA,
    section 4.3, carried down to single tokens). That takes K c log c exponentials instead of K c^2.
    Returns scores `[..., c, c]`, and `[..., c, K]` the sums of g from the chunk's start up to and including
    each token, and from behind each token to the chunk's end.
    """

    def halves(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`[..., c, K]` -> the earlier and the later block of every pair, each `[..., pairs, size, K]`."""
        return x.unflatten(-2, (-1, 2, size)).unbind(-3)

    size = 1
    scores = (q * k).sum(-1)[..., None, None]  # [..., blocks, size, size]
    since_start, to_end = g, torch.zeros_like(g)
    while size < g.shape[-2]:
        (start_1, start_2), (end_1, end_2) = halves(since_start), halves(to_end)
        cross = (halves(q)[1] * start_2.exp()) @ (halves(k)[0] * end_1.exp()).transpose(-1, -2)
        scores_1, scores_2 = scores.unflatten(-3, (-1, 2)).unbind(-3)
        upper = torch.cat([scores_1, torch.zeros_like(scores_1)], dim=-1)
        scores = torch.cat([upper, torch.cat([cross, scores_2], dim=-1)], dim=-2)
        since_start = torch.cat([start_1, start_2 + start_1[..., -1:, :]], dim=-2).flatten(-3, -2)
        to_end = torch.cat([end_1 + start_2[..., -1:, :], end_2], dim=-2).flatten(-3, -2)
        size *= 2
    return scores.squeeze(-3), since_start, to_end


def chunk(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, *, state: torch.Tensor | None, chunk_size: int
) -> Result:
    """The same by chunks (GLA, section 4.3)."""
    T = q.shape[1]
    q, k, v, g = (to_chunks(x, chunk_size) for x in (q, k, v, g))
    scores, since_start, to_end = decayed_scores(q, k, g)
    from_start = since_start.exp()
    decay = from_start[..., -1, :].unsqueeze(-1)
    out, state = read_out(scores, q * from_start, k * to_end.exp(), v, decay, state)
    return from_chunks(out, T), state


def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, *, state: torch.Tensor) -> Result:
    """A few tokens (decoding: one) from a state."""
    outs = []
    for q_t, k_t, v_t, decay in zip(q.unbind(1), k.unbind(1), v.unbind(1), g.exp().unbind(1), strict=True):
        state = decay.unsqueeze(-1) * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outs.append((q_t.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outs, dim=1), state


def kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Result:
    """fla's chunk_gla."""
    call = fla_kernel("gla", "gla", "chunk_gla")
    return call(q, k, v, g, scale=scale, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)


GLA = Recurrence("gla", naive, chunk, step, kernel)


def gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Result:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, y_t = scale * q_t S_t.

    q `[B, T, Hq, K]`, k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]`, g `[B, T, Hq or Hkv, K]` log-decay <= 0; scale
    defaults to K ** -0.5; mask `[B, T]` bool, real tokens first in each row; documents `[B, T]` int,
    non-decreasing; state as returned; chunk_size in tokens, a power of two.
    Returns y `[B, T, Hq, V]` in v's dtype and the state `[B, Hq, K, V]` in float32 (float64 for float64
    inputs); with documents it is that of the row's last document. Padding changes no state; y at padding
    carries no meaning.
    Raises ValueError for shapes that do not fit, documents with a state, or a backend that cannot be met.
    """
    if g.dim() != 4 or g.shape[3] != q.shape[3]:
        raise ValueError(f"gla: g must be [B, T, H, K], got {tuple(g.shape)} beside q {tuple(q.shape)}")
    out, state = run(
        GLA,
        q,
        k,
        v,
        (g,),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        mask=mask,
        documents=documents,
        state=state,
        chunk_size=chunk_size,
        backend=backend,
    )
    return out.to(v.dtype), state
