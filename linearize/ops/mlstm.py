"""mLSTM: a matrix memory with exponential input gate, sigmoid forget gate and a normaliser (xLSTM).

Source: Beck et al. 2024, arXiv 2405.04517, eqs. 19 - 27; the stabiliser is that of eq. 15. `mlstm` is the operator.

The memory is kept divided by exp(m_t), m_t = max(g_t + m_{t-1}, i_t, 0). No output depends on the choice of m_t, so
none has a gradient by it and none is taken; only a state that comes in counts with its m. The 0, which the paper does
not have, keeps m_t finite when nothing was written yet. Gates enter as g + (m_{t-1} - m_t), not (g + m_{t-1}) - m_t:
what m_t lost to rounding then comes back, and long rows do not drift.
"""

import torch

from linearize.ops.layout import from_chunks, read_out, to_chunks
from linearize.ops.recurrence import Recurrence, run
from linearize.ops.simple_gla import segment_sums

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Result = tuple[torch.Tensor, State]


def normalised(num: torch.Tensor, den: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """num `[..., V]` / max(|den|, exp(-m)), den and m `[...]`: the 1 of eq. 21 under the stabiliser."""
    least = (-m).exp().clamp_min(torch.finfo(m.dtype).tiny)
    return num / torch.maximum(den.abs(), least).unsqueeze(-1)


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, i: torch.Tensor, *, state: State | None
) -> Result:
    """Token by token, also for decoding; C and n of `mlstm`, both divided by exp(m_t)."""
    B, _, H, K = q.shape
    if state is None:
        state = q.new_zeros(B, H, K, v.shape[-1]), q.new_zeros(B, H, K), q.new_zeros(B, H)
    (C, n, m), outs = state, []
    for q_t, k_t, v_t, g_t, i_t in zip(*(x.unbind(1) for x in (q, k, v, g, i)), strict=True):
        before, m = m, torch.maximum(g_t + m, i_t).clamp_min(0.0).detach()
        forget, write = (g_t + (before - m)).exp().unsqueeze(-1), (i_t - m).exp().unsqueeze(-1) * k_t
        C = forget.unsqueeze(-1) * C + write.unsqueeze(-1) * v_t.unsqueeze(-2)
        n = forget * n + write
        outs.append(normalised((q_t.unsqueeze(-2) @ C).squeeze(-2), (q_t * n).sum(-1), m))
    return torch.stack(outs, dim=1), (C, n, m)


def stabilisers(
    between: torch.Tensor, from_start: torch.Tensor, i: torch.Tensor, m: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """m before each chunk `[B, H, N, 1]` and at each token `[B, H, N, c]`, from the m that comes in, `[B, H]`.

    between `[B, H, N, c, c]` sums of g from behind one token up to another, from_start and i `[B, H, N, c]`.
    """
    own = (between + i.unsqueeze(-2)).amax(-1).clamp_min(0.0).detach()
    before = []
    for own_n, decay_n in zip(own[..., -1].unbind(-1), from_start[..., -1].detach().unbind(-1), strict=True):
        before.append(m)
        m = torch.maximum(decay_n + m, own_n).detach()
    start = torch.stack(before, dim=-1).unsqueeze(-1)
    return start, torch.maximum(from_start + start, own).detach()


def chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    i: torch.Tensor,
    *,
    state: State | None,
    chunk_size: int,
) -> Result:
    """The same by chunks: `simple_gla`'s form with input gates in the decays and the normaliser as a column of v."""
    T = q.shape[1]
    v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], dim=-1)
    # padding up to whole chunks holds k = 0, so writes nothing, and i = 0, which moves no m
    q, k, v, g, i = (to_chunks(x, chunk_size) for x in (q, k, v, g, i))
    memory = None if state is None else torch.cat([state[0], state[1].unsqueeze(-1)], dim=-1)
    between, from_start = segment_sums(g), g.cumsum(-1)
    start, m = stabilisers(between, from_start, i, g.new_zeros(g.shape[:2]) if state is None else state[2])
    scores = (q @ k.transpose(-1, -2)) * (between + (i.unsqueeze(-2) - m.unsqueeze(-1))).exp()
    forget = (from_start + (start - m)).exp().unsqueeze(-1)
    write = (between[..., -1, :] + (i - m[..., -1:])).exp().unsqueeze(-1)
    out, memory = read_out(scores, q * forget, k * write, v, forget[..., -1:, :], memory)
    out = normalised(out[..., :-1], out[..., -1], m)
    return from_chunks(out, T), (memory[..., :-1], memory[..., -1], m[:, :, -1, -1])


# Zeros are neutral for both gates: a padded token has k = 0, and i = 0 does not exceed the least m_t.
MLSTM = Recurrence("mlstm", naive, chunk, naive)


def mlstm(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    i: torch.Tensor,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    state: State | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Result:
    """y_t = scale * q_t C_t / max(|scale * q_t n_t|, 1) with C_t = exp(g_t) C_{t-1} + exp(i_t) k_t v_t^T and
    n_t = exp(g_t) n_{t-1} + exp(i_t) k_t (xLSTM, arXiv 2405.04517, eqs. 19 - 27).

    q `[B, T, Hq, K]`, k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]`; g, i `[B, T, Hq or Hkv]`: logarithms of the forget gate,
    <= 0, and of the input gate, any sign, -inf for none; scale defaults to K ** -0.5; mask `[B, T]` bool, real tokens
    first in each row; documents `[B, T]` int, non-decreasing; state as returned; chunk_size in tokens, a power of two.
    Returns y `[B, T, Hq, V]` in v's dtype and the state (C `[B, Hq, K, V]`, n `[B, Hq, K]`, m `[B, Hq]`), C and n
    divided by exp(m), in float32 (float64 for float64 inputs); with documents it is that of the row's last document.
    Padding changes no state; y at padding carries no meaning. fla has no kernel for it.
    Raises ValueError for shapes that do not fit, documents with a state, or a backend that cannot be met.
    """
    if g.dim() != 3 or g.shape != i.shape:
        raise ValueError(f"mlstm: g and i must both be [B, T, H], got {tuple(g.shape)} and {tuple(i.shape)}")
    out, state = run(
        MLSTM,
        q,
        k,
        v,
        (g, i),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        mask=mask,
        documents=documents,
        state=state,
        chunk_size=chunk_size,
        backend=backend,
    )
    return out.to(v.dtype), state
