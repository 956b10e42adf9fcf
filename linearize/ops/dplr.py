"""Generalised delta rule: a transition that is diagonal plus low rank (DPLR), as in RWKV-7.

Source: Peng et al. 2025, arXiv 2503.14456, section 4 (there a = -kappa_hat, b = kappa_hat * in-context learning rate).
`dplr` is the operator; the log-decay g <= 0 may be as strong as the caller likes: no exponent is ever positive.
"""

import torch
import torch.nn.functional as F

from linearize.ops.backend import fla_kernel
from linearize.ops.gla import decayed_scores
from linearize.ops.layout import from_chunks, to_chunks
from linearize.ops.recurrence import Recurrence, run

Result = tuple[torch.Tensor, torch.Tensor]

MOST_KEY_CHANNELS = 256
"""The kernel keeps whole columns of the state on the chip."""


def remaining(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """a without the channels that the token forgets for good (g = -inf).

    a reads the state before its decay, so without this a token would carry what a reset removes over to its channels b.
    """
    return a.masked_fill(g == float("-inf"), 0.0)


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    state: torch.Tensor | None,
) -> Result:
    """Token by token, also for decoding: S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, y_t = q_t S_t.

    With g_t = -inf, a_t too sees nothing of those channels of S_{t-1}.
    """
    B, _, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state
    a, outs = remaining(a, g), []
    for q_t, k_t, v_t, g_t, a_t, b_t in zip(*(x.unbind(1) for x in (q, k, v, g, a, b)), strict=True):
        x_t = a_t.unsqueeze(-2) @ S
        S = g_t.exp().unsqueeze(-1) * S + b_t.unsqueeze(-1) * x_t + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outs.append((q_t.unsqueeze(-2) @ S).squeeze(-2))
    return torch.stack(outs, dim=1), S


def down(x: torch.Tensor) -> torch.Tensor:
    """x `[..., c, D]` one token later within its chunk, 0 in the first row."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0))


def chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    state: torch.Tensor | None,
    chunk_size: int,
) -> Result:
    """The same by chunks: what each a_t reads, x_t = a_t^T S_{t-1}, solves a triangular system within its chunk.

    x_t = a_t^T D_{t-1,0} S + sum_{j<t} (a_t . D_{t-1,j} k_j) v_j + (a_t . D_{t-1,j} b_j) x_j with the chunk's
    first state S and D_ij = diag(exp(g_{j+1} + ... + g_i)). Decays up to t - 1 are those of a row that stands one
    token earlier: a is scored one token up and its scores moved one down, and nothing is subtracted from a sum.
    """
    T = q.shape[1]
    a = remaining(a, g)
    q, k, v, g, a, b = (to_chunks(x, chunk_size) for x in (q, k, v, g, a, b))
    rows = torch.stack([q, F.pad(a[..., 1:, :], (0, 0, 0, 1))]).unsqueeze(1)
    scores, since_start, to_end = decayed_scores(rows, torch.stack([k, b]), g)  # [2, 2, B, H, N, c, c]
    (q_k, q_b), (a_k, a_b) = scores
    from_start, to_end = since_start.exp(), to_end.exp()
    # exp(0) = 1 before the first token, which `down` would make 0
    read = a * torch.cat([torch.ones_like(from_start[..., :1, :]), from_start[..., :-1, :]], dim=-2)
    system = torch.eye(g.shape[-2], dtype=g.dtype, device=g.device) - down(a_b)
    right = torch.cat([down(a_k) @ v, read], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, seen = solved.split([v.shape[-1], k.shape[-1]], dim=-1)  # x = written + seen S

    updates = (k * to_end).transpose(-1, -2) @ v
    decay, ends = from_start[..., -1, :].unsqueeze(-1), (b * to_end).transpose(-1, -2)
    S = torch.zeros_like(updates[:, :, 0]) if state is None else state
    before, reads = [], []
    for n in range(updates.shape[2]):
        before.append(S)
        reads.append(written[:, :, n] + seen[:, :, n] @ S)
        S = decay[:, :, n] * S + updates[:, :, n] + ends[:, :, n] @ reads[-1]
    out = q_k @ v + q_b @ torch.stack(reads, dim=2) + (q * from_start) @ torch.stack(before, dim=2)
    return from_chunks(out, T), S


def kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scale: float,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Result:
    """fla's chunk_dplr_delta_rule; it wants a and b in the dtype of q."""
    call = fla_kernel("dplr", "generalized_delta_rule", "chunk_dplr_delta_rule")
    return call(
        q,
        k,
        v,
        a=a.to(q.dtype),
        b=b.to(q.dtype),
        gk=g,
        scale=scale,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )


def obstacle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> str:
    """Why fla's kernel cannot take these heads, or an empty string."""
    K = q.shape[-1]
    return f"it takes up to {MOST_KEY_CHANNELS} key channels, these have {K}" if K > MOST_KEY_CHANNELS else ""


DPLR = Recurrence("dplr", naive, chunk, naive, kernel, obstacle)


def dplr(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Result:
    """S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, y_t = scale * q_t S_t (RWKV-7, arXiv 2503.14456).

    q `[B, T, Hq, K]`, k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]`; g, a, b `[B, T, Hq or Hkv, K]`: g the log-decay <= 0, a
    what is read from the state before it decays, b where that is written back (RWKV-7: a = -kappa_hat with |kappa_hat|
    = 1, b = kappa_hat * rate, rate in [0, 1]; other a and b may let the state grow without bound). Channels with g =
    -inf are forgotten before a reads them. scale defaults to K ** -0.5; mask `[B, T]` bool, real tokens first in each
    row; documents `[B, T]` int, non-decreasing; state as returned; chunk_size in tokens, a power of two.
    Returns y `[B, T, Hq, V]` in v's dtype and the state `[B, Hq, K, V]` in float32 (float64 for float64
    inputs); with documents it is that of the row's last document. Padding changes no state; y at padding
    carries no meaning.
    Raises ValueError for shapes that do not fit, documents with a state, or a backend that cannot be met.
    """
    for name, gate in (("g", g), ("a", a), ("b", b)):
        if gate.dim() != 4 or gate.shape[3] != q.shape[3]:
            raise ValueError(f"dplr: {name} must be [B, T, H, K], got {tuple(gate.shape)} beside q {tuple(q.shape)}")
    out, state = run(
        DPLR,
        q,
        k,
        v,
        (g, a, b),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        mask=mask,
        documents=documents,
        state=state,
        chunk_size=chunk_size,
        backend=backend,
    )
    return out.to(v.dtype), state
