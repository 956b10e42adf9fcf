"""The delta rule: before a token writes its value, what the state already holds under its key is taken back.

S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, y_t = S_t^T q_t. Without g it is DeltaNet (Yang
et al. 2024, arXiv 2406.06484), with one g per head Gated DeltaNet (2412.06464, section 3), with one per key channel
Kimi Delta Attention (2510.26692, section 3). `delta_rule` is the operator; no exponent is ever positive.
"""

from typing import Any

import torch

from linearize.ops.backend import fla_kernel, kernel_gate
from linearize.ops.gla import decayed_scores
from linearize.ops.layout import from_chunks, to_chunks
from linearize.ops.recurrence import Gate, Recurrence, run
from linearize.ops.simple_gla import segment_sums

Result = tuple[torch.Tensor, torch.Tensor]

KERNEL_CHANNELS = 256
"""Most key channels that fla's kernels take."""


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: Gate, beta: torch.Tensor, *, state: torch.Tensor | None
) -> Result:
    """The recurrence, token by token: decay, read under k_t, write beta_t times what is missing, read under q_t."""
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state
    outs = []
    for t in range(T):
        if g is not None:
            S = _over_state(g[:, t].exp(), S) * S
        missing = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + torch.einsum("bhk,bhv->bhkv", beta[:, t].unsqueeze(-1) * k[:, t], missing)
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outs, dim=1), S


def _over_state(decay: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    """A token's decay `[B, H]` or `[B, H, K]` beside the state `[B, H, K, V]`."""
    return decay.reshape(*decay.shape, *[1] * (S.dim() - decay.dim()))


def _decayed_products(
    q: torch.Tensor, k: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What happens within chunks, for q, k `[B, H, N, c, K]` and g `[B, H, N, c]` or `[B, H, N, c, K]`.

    Returns q_i . k_j and k_i . k_j `[B, H, N, c, c]` under the decay from j to i, 0 for j > i; and the decays from the
    chunk's start up to and including each token, and from behind each token to its end, `[B, H, N, c, 1 or K]`.
    """
    if g.dim() == k.dim():
        (scores, overlaps), since_start, to_end = decayed_scores(torch.stack([q, k]), k, g)
        return scores, overlaps, since_start.exp(), to_end.exp()
    between, keys = segment_sums(g).exp(), k.transpose(-1, -2)
    from_start, to_end = g.cumsum(-1).exp().unsqueeze(-1), between[..., -1, :].unsqueeze(-1)
    return q @ keys * between, k @ keys * between, from_start, to_end


def chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: Gate,
    beta: torch.Tensor,
    *,
    state: torch.Tensor | None,
    chunk_size: int,
) -> Result:
    """The same by chunks.

    Let u_i be what token i writes under its key: beta_i (v_i - k_i^T of the decayed state). The state before i is the
    chunk's first one S and the writes u_j before i, each decayed up to i, so (I + A) u = beta v - (beta decayed k) S
    with A_ij = beta_i (k_i . k_j decayed from j to i) for j < i. A unit triangular solve gives u = U - W S for all
    chunks at once (the UT transform, arXiv 2406.06484, section 3); only S passes from chunk to chunk.
    """
    T, V = v.shape[1], v.shape[-1]
    g = q.new_zeros(1, T, 1) if g is None else g
    q, k, v, g, beta = (to_chunks(x, chunk_size) for x in (q, k, v, g, beta))
    scores, overlaps, from_start, to_end = _decayed_products(q, k, g)
    beta = beta.unsqueeze(-1)
    # The solver takes the diagonal for ones and what is above it for zeros, whatever is there.
    targets = torch.cat([beta * v, beta * from_start * k], dim=-1)
    solved = torch.linalg.solve_triangular(beta * overlaps, targets, upper=False, unitriangular=True)
    keys = (k * to_end).transpose(-1, -2)
    decays = from_start[..., -1:, :].transpose(-1, -2).unbind(2)
    S = q.new_zeros(*q.shape[:2], q.shape[-1], V) if state is None else state
    before, writes = [], []
    for solved_n, keys_n, decay in zip(solved.unbind(2), keys.unbind(2), decays, strict=True):
        before.append(S)
        writes.append(solved_n[..., :V] - solved_n[..., V:] @ S)
        S = decay * S + keys_n @ writes[-1]
    out = scores @ torch.stack(writes, dim=2) + (q * from_start) @ torch.stack(before, dim=2)
    return from_chunks(out, T), S


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: Gate, beta: torch.Tensor, *, state: torch.Tensor
) -> Result:
    """A few tokens (decoding: one) from a state, which is read once for k and q together and written once.

    After the write q reads y = S^T q + (k . q) u, with S the decayed state and u what is written under k.
    """
    outs = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t, beta_t = q[:, t].unsqueeze(-2), k[:, t].unsqueeze(-2), v[:, t].unsqueeze(-2), beta[:, t]
        if g is not None:
            state = _over_state(g[:, t].exp(), state) * state
        held, read = (torch.cat([k_t, q_t], dim=-2) @ state).split(1, dim=-2)
        write = beta_t[..., None, None] * (v_t - held)
        outs.append((read + (q_t @ k_t.transpose(-1, -2)) * write).squeeze(-2))
        state = state + k_t.transpose(-1, -2) * write
    return torch.stack(outs, dim=1), state


def kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: Gate,
    beta: torch.Tensor,
    *,
    scale: float,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Result:
    """fla's chunk_delta_rule, chunk_gated_delta_rule or chunk_kda, by the shape of g; see `kernel_gate`."""
    options: dict[str, Any] = dict(scale=scale, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
    if g is None and q.dtype != torch.float32:
        return fla_kernel("delta_rule", "delta_rule", "chunk_delta_rule")(q, k, v, beta, **options)
    if g is None:  # chunk_delta_rule refuses float32
        g = torch.zeros_like(beta)
    if g.dim() == 3:
        g = kernel_gate(g, k, q, v, beta)
    folder = ("gated_delta_rule", "chunk_gated_delta_rule") if g.dim() == 3 else ("kda", "chunk_kda")
    gated = fla_kernel("delta_rule", *folder)
    return gated(q, k, v, g, beta, **options)


def obstacle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: Gate, beta: torch.Tensor) -> str:
    """Why fla's kernel cannot take these arguments here, or an empty string."""
    if q.shape[-1] > KERNEL_CHANNELS:
        return f"fla's delta rules take keys of at most {KERNEL_CHANNELS} channels, not {q.shape[-1]}"
    return ""


DELTA_RULE = Recurrence("delta_rule", naive, chunk, step, kernel, obstacle, unit_keys=True)


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Result:
    """S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, y_t = scale * S_t^T q_t.

    q `[B, T, Hq, K]`, k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]`; g log-decay <= 0, `[B, T, H]` or, per key channel,
    `[B, T, H, K]`, or None for no decay; beta `[B, T, H]` in (0, 1), or (0, 2) for negative eigenvalues; H is Hq or
    Hkv. k is meant to have unit norm: the state may grow without bound where beta |k|^2 > 2; it is not normalised here.
    scale defaults to K ** -0.5; mask `[B, T]` bool, real tokens first in each row; documents `[B, T]` int,
    non-decreasing; state as returned; chunk_size in tokens, a power of two.
    Returns y `[B, T, Hq, V]` in v's dtype and the state `[B, Hq, K, V]` in float32 (float64 for float64 inputs); with
    documents it is that of the row's last document. Padding changes no state; y at padding carries no meaning.
    Raises ValueError for shapes that do not fit, documents with a state, or a backend that cannot be met.
    """
    check_gates("delta_rule", q, g)
    if beta.dim() != 3:
        raise ValueError(f"delta_rule: beta must be [B, T, H], got {tuple(beta.shape)} beside q {tuple(q.shape)}")
    out, state = run(
        DELTA_RULE,
        q,
        k,
        v,
        (g, beta),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        mask=mask,
        documents=documents,
        state=state,
        chunk_size=chunk_size,
        backend=backend,
    )
    return out.to(v.dtype), state


def check_gates(op: str, q: torch.Tensor, g: Gate) -> None:
    """Raises ValueError for a decay that is neither per head nor per key channel."""
    if g is not None and g.dim() != 3 and (g.dim() != 4 or g.shape[3] != q.shape[3]):
        raise ValueError(f"{op}: g must be [B, T, H] or [B, T, H, K], got {tuple(g.shape)} beside q {tuple(q.shape)}")
