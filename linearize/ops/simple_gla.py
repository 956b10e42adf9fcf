"""Gated linear attention with one decay per head and token, as in RetNet, Mamba-2 and Lightning attention.

Source of the chunked form: Dao & Gu 2024, arXiv 2405.21060. `simple_gla` is the operator; the log-decay g <=
0 may be as strong as the caller likes: no exponent is ever positive.
"""

import torch

from linearize.ops.backend import fla_kernel, kernel_gate
from linearize.ops.layout import from_chunks, read_out, to_chunks
from linearize.ops.recurrence import Gate, Recurrence, run

Result = tuple[torch.Tensor, torch.Tensor]


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: Gate, *, state: torch.Tensor | None) -> Result:
    """The recurrence, token by token: S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = q_t S_t; g None never forgets."""
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state
    outs = []
    for t in range(T):
        if g is not None:
            S = g[:, t].exp()[..., None, None] * S
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: Gate, *, state: torch.Tensor | None, chunk_size: int
) -> Result:
    """The same by chunks (the SSD form, Dao & Gu 2024, section 6)."""
    T = q.shape[1]
    q, k, v = (to_chunks(x, chunk_size) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2)
    if g is None:
        out, state = read_out(scores.tril(), q, k, v, None, state)
        return from_chunks(out, T), state
    g = to_chunks(g, chunk_size)
    between = segment_sums(g).exp()
    from_start = g.cumsum(-1).exp().unsqueeze(-1)
    to_end = between[..., -1, :].unsqueeze(-1)
    out, state = read_out(scores * between, q * from_start, k * to_end, v, from_start[..., -1:, :], state)
    return from_chunks(out, T), state


def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: Gate, *, state: torch.Tensor) -> Result:
    """A few tokens (decoding: one) from a state."""
    outs = []
    for t in range(q.shape[1]):
        if g is not None:
            state = g[:, t].exp()[..., None, None] * state
        state = state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outs, dim=1), state


def kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: Gate,
    *,
    scale: float,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Result:
    """fla's chunk_simple_gla or, where `kernel_gate` says so, chunk_gla."""
    g = None if g is None else kernel_gate(g, k, q, v)
    folder = ("gla", "chunk_gla") if g is not None and g.dim() == 4 else ("simple_gla", "chunk_simple_gla")
    call = fla_kernel("simple_gla", *folder)
    return call(q, k, v, g=g, scale=scale, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)


SIMPLE_GLA = Recurrence("simple_gla", naive, chunk, step, kernel)


def simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Result:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = scale * q_t S_t.

    q `[B, T, Hq, K]`, k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]`, g `[B, T, Hq or Hkv]` log-decay <= 0, or None for no
    decay; scale defaults to K ** -0.5; mask `[B, T]` bool, real tokens first in each row; documents `[B, T]` int,
    non-decreasing; state as returned; chunk_size in tokens, a power of two.
    Returns y `[B, T, Hq, V]` in v's dtype and the state `[B, Hq, K, V]` in float32 (float64 for float64
    inputs); with documents it is that of the row's last document. Padding changes no state; y at padding
    carries no meaning.
    Raises ValueError for shapes that do not fit, documents with a state, or a backend that cannot be met.
    """
    if g is not None and g.dim() != 3:
        raise ValueError(f"simple_gla: g must be [B, T, H], got {tuple(g.shape)} beside q {tuple(q.shape)}")
    out, state = run(
        SIMPLE_GLA,
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
