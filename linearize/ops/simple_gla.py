"""Gated linear attention with one decay per head and token, as in RetNet, Mamba-2 and Lightning attention.

Source of the chunked form: Dao & Gu 2024, arXiv 2405.21060. `simple_gla` is the operator; the log-decay g <=
0 may be as strong as the caller likes: no exponent is ever positive.
"""

import torch

from linearize.ops.backend import choose, gate_obstacle
from linearize.ops.documents import chunk_visibility, cumulative_lengths, fill_padding
from linearize.ops.layout import (
    check_inputs,
    expand_heads,
    fit_chunk,
    from_chunks,
    pad_documents,
    read_out,
    to_chunks,
    working_dtype,
    zero_padding,
)


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float,
    documents: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence, token by token: S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = scale q_t S_t; in any float
    dtype.

    Shapes as `simple_gla`, with as many kv heads as query heads.
    """
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state
    outs = []
    for t in range(T):
        if documents is not None and t > 0:
            S = S * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        S = g[:, t].exp()[..., None, None] * S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outs, dim=1), S


def segment_sums(g: torch.Tensor) -> torch.Tensor:
    """g `[..., c]` -> `[..., c, c]` with entry (i, j) = g_{j+1} + ... + g_i for i >= j, else -inf.

    Summed as they stand rather than as differences of a running sum, which would lose the small decays beside
    large ones to cancellation.
    """
    c = g.shape[-1]
    later = torch.ones(c, c, dtype=torch.bool, device=g.device).triu(1)
    sums = torch.where(later, g.unsqueeze(-2), 0).cumsum(-1).transpose(-1, -2)
    return sums.masked_fill(later, float("-inf"))


def chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float,
    documents: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by chunks (the SSD form, Dao & Gu 2024, section 6). Arguments as `naive`."""
    T = q.shape[1]
    size = fit_chunk("simple_gla", chunk_size, T)
    visibility = None
    if documents is not None:
        padded = pad_documents(documents, size)
        visibility = chunk_visibility(padded, padded, size)
    q, k, v, g = (to_chunks(x, size) for x in (q * scale, k, v, g))
    between = segment_sums(g).exp()
    scores = (q @ k.transpose(-1, -2)) * between
    from_start = g.cumsum(-1).exp().unsqueeze(-1)
    to_end = between[..., -1, :].unsqueeze(-1)
    out, state = read_out(scores, q * from_start, k * to_end, v, from_start[..., -1:, :], visibility, state)
    return from_chunks(out, T), state


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A few tokens (decoding: one) from a state. Arguments as `naive`."""
    outs = []
    for q_t, k_t, v_t, decay in zip(q.unbind(1), k.unbind(1), v.unbind(1), g.exp().unbind(1), strict=True):
        state = decay[..., None, None] * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outs.append(((scale * q_t).unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outs, dim=1), state


def _fla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    documents: torch.Tensor | None,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """fla's kernel; documents become `cu_seqlens` over the rows laid end to end."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        raise ValueError(f"simple_gla: the fla kernels cannot be imported ({error}); use backend 'torch'") from error
    if documents is None:
        return chunk_simple_gla(q, k, v, g=g, scale=scale, initial_state=state, output_final_state=True)
    cu_seqlens, last = cumulative_lengths(documents)
    flat = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
    out, states = chunk_simple_gla(
        *flat, g=g.flatten(0, 1).unsqueeze(0), scale=scale, output_final_state=True, cu_seqlens=cu_seqlens
    )
    return out.view(*q.shape[:3], -1), states[last]


def simple_gla(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = scale * q_t S_t.

    q `[B, T, Hq, K]`, k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]`, g `[B, T, Hq or Hkv]` log-decay <= 0; scale
    defaults to K ** -0.5; mask `[B, T]` bool, real tokens first in each row; documents `[B, T]` int,
    non-decreasing; state as returned; chunk_size in tokens, a power of two.
    Returns y `[B, T, Hq, V]` in v's dtype and the state `[B, Hq, K, V]` in float32 (float64 for float64
    inputs); with documents it is that of the row's last document. Padding changes no state; y at padding
    carries no meaning.
    Raises ValueError for shapes that do not fit, documents with a state, or a backend that cannot be met.
    """
    check_inputs("simple_gla", q, k, v, mask=mask, documents=documents, state=state)
    if g.shape[:2] != q.shape[:2] or g.dim() != 3:
        raise ValueError(f"simple_gla: g must be [B, T, H], got {tuple(g.shape)} beside q {tuple(q.shape)}")
    chosen = "step"
    if q.shape[1] > 1 or state is None or backend not in ("auto", "torch"):
        chosen = choose("simple_gla", backend, q, gate_obstacle(q, k, v, g))
    with torch.autocast(q.device.type, enabled=False):
        dtype, heads = working_dtype(q, k, v, g), q.shape[2]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        documents = None if documents is None else fill_padding(documents, mask)
        out_dtype = v.dtype
        k, v, g = (expand_heads(zero_padding(x, mask), heads) for x in (k, v, g))
        g = g.to(dtype)
        if chosen == "fla":
            shared = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
            out, state = _fla(q.to(shared), k.to(shared), v.to(shared), g, scale, documents, state)
        else:
            q, k, v = (x.to(dtype) for x in (q, k, v))
            if chosen == "step" and state is not None:
                out, state = step(q, k, v, g, state, scale=scale)
            elif chosen == "naive":
                out, state = naive(q, k, v, g, scale=scale, documents=documents, state=state)
            else:
                out, state = chunk(q, k, v, g, scale=scale, documents=documents, state=state, chunk_size=chunk_size)
        return out.to(out_dtype), state
