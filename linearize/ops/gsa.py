"""Gated slot attention: softmax attention over a few slots that remember keys and values with a decay each.

Source: Zhang et al. 2024, arXiv 2409.07146, section 3 (there s = 1 - exp(g)). `gsa` is the operator; the log-decay g <=
0 may be as strong as the caller likes: no exponent is ever positive.
"""

import torch
import torch.nn.functional as F

from linearize.ops.backend import fla_kernel
from linearize.ops.gla import decayed_scores
from linearize.ops.layout import carry, from_chunks, read_out, to_chunks
from linearize.ops.recurrence import Recurrence, run

State = tuple[torch.Tensor, torch.Tensor]
Result = tuple[torch.Tensor, State]


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, s: torch.Tensor, *, state: State | None
) -> Result:
    """Token by token, also for decoding; the columns of Kt `[K, M]` and the rows of Vt `[M, V]` are the slots.

    Kt_t = Kt_{t-1} diag(exp(g_t)) + k_t s_t^T, Vt_t = diag(exp(g_t)) Vt_{t-1} + s_t v_t^T,
    y_t = softmax(q_t Kt_t) Vt_t.
    """
    B, _, H, K = q.shape
    M, V = s.shape[-1], v.shape[-1]
    Kt, Vt = (q.new_zeros(B, H, K, M), q.new_zeros(B, H, M, V)) if state is None else state
    outs = []
    for q_t, k_t, v_t, decay, s_t in zip(*(x.unbind(1) for x in (q, k, v, g.exp(), s)), strict=True):
        Kt = Kt * decay.unsqueeze(-2) + k_t.unsqueeze(-1) * s_t.unsqueeze(-2)
        Vt = decay.unsqueeze(-1) * Vt + s_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outs.append(((q_t.unsqueeze(-2) @ Kt).softmax(-1) @ Vt).squeeze(-2))
    return torch.stack(outs, dim=1), (Kt, Vt)


def sums_behind(g: torch.Tensor) -> torch.Tensor:
    """g `[..., c, M]` -> the sums of g from behind each token to the end."""
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def slot_logits(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """logits_im = sum_{j<=i} (q_i . k_j) s_jm exp(g_{j+1,m} + ... + g_im), `[..., c, M]`.

    q, k `[..., c, K]`, g, s `[..., c, M]`, c = 2^n. Blocks are merged pairwise, as in `gla.decayed_scores`; but the
    decay belongs to the channels of what is summed, so the earlier block's s, decayed up to the border, reaches the
    later block's tokens by plain scores and decays there from the border on.
    """
    logits = ((q * k).sum(-1, keepdim=True) * s).unsqueeze(-2)  # [..., blocks, size, M]
    size = 1
    while size < g.shape[-2]:
        (_, q_2), (k_1, _), (g_1, g_2), (s_1, _) = (x.unflatten(-2, (-1, 2, size)).unbind(-3) for x in (q, k, g, s))
        cross = (q_2 @ k_1.transpose(-1, -2)) @ (s_1 * sums_behind(g_1).exp()) * g_2.cumsum(-2).exp()
        logits_1, logits_2 = logits.unflatten(-3, (-1, 2)).unbind(-3)
        logits = torch.cat([logits_1, logits_2 + cross], dim=-2)
        size *= 2
    return logits.squeeze(-3)


def chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    s: torch.Tensor,
    *,
    state: State | None,
    chunk_size: int,
) -> Result:
    """The same by chunks, in two passes: logits over the slots, then `gla` with their softmax as queries."""
    T = q.shape[1]
    q, k, v, g, s = (to_chunks(x, chunk_size) for x in (q, k, v, g, s))
    Kt, Vt = (None, None) if state is None else (state[0].transpose(-1, -2), state[1])
    from_start, written = g.cumsum(-2).exp(), s * sums_behind(g).exp()
    decay = from_start[..., -1, :].unsqueeze(-1)
    before, Kt = carry(written.transpose(-1, -2) @ k, decay, Kt)  # transposed: slots decay along rows
    logits = slot_logits(q, k, g, s) + (q @ before.transpose(-1, -2)) * from_start
    weights = logits.softmax(-1)
    scores, _, _ = decayed_scores(weights, s, g)
    out, Vt = read_out(scores, weights * from_start, written, v, decay, Vt)
    return from_chunks(out, T), (Kt.transpose(-1, -2).contiguous(), Vt)


def kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    s: torch.Tensor,
    *,
    scale: float,
    state: State | None,
    cu_seqlens: torch.Tensor | None,
) -> Result:
    """fla's chunk_gsa; it multiplies s with q, k and v, so wants it in their dtype."""
    call = fla_kernel("gsa", "gsa", "chunk_gsa")
    out, states = call(
        q,
        k,
        v,
        s=s.to(q.dtype),
        g=g,
        scale=scale,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    return out, tuple(states)


GSA = Recurrence("gsa", naive, chunk, naive, kernel)


def gsa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    s: torch.Tensor,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    state: State | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Result:
    """y_t = softmax(scale * q_t Kt_t) Vt_t, Kt_t = Kt_{t-1} diag(exp(g_t)) + k_t s_t^T, Vt likewise with v.

    q `[B, T, Hq, K]`, k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]`; g, s `[B, T, Hq or Hkv, M]`: log-decay <= 0 of
    each of M slots and how much of the token it takes in, usually 1 - exp(g) (arXiv 2409.07146); scale defaults to K **
    -0.5; mask `[B, T]` bool, real tokens first in each row; documents `[B, T]` int, non-decreasing; state as
    returned; chunk_size in tokens, a power of two.
    Returns y `[B, T, Hq, V]` in v's dtype and the state (Kt `[B, Hq, K, M]`, Vt `[B, Hq, M, V]`) in float32 (float64
    for float64 inputs); with documents it is that of the row's last document. Padding changes no state; y at
    padding carries no meaning.
    Raises ValueError for shapes that do not fit, documents with a state, or a backend that cannot be met.
    """
    if g.dim() != 4 or g.shape != s.shape:
        raise ValueError(f"gsa: g and s must both be [B, T, H, M], got {tuple(g.shape)} and {tuple(s.shape)}")
    out, state = run(
        GSA,
        q,
        k,
        v,
        (g, s),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        mask=mask,
        documents=documents,
        state=state,
        chunk_size=chunk_size,
        backend=backend,
    )
    return out.to(v.dtype), state
