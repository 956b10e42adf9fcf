"""What the operators share: head expansion, working precision, padding, chunk views and the carried state.

Public operators take `[B, T, H, D]`; the chunked forms work on `[B, H, N, c, D]` (N chunks of c tokens).
`expand_heads` is the only place in the package that turns kv heads into query heads.
"""

import torch
import torch.nn.functional as F


def expand_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeats each kv head in place so that query head h finds its own copy of kv head h // G.

    x `[B, T, Hkv, ...]` -> `[B, T, heads, ...]`, heads = G * Hkv.
    Raises ValueError when heads is no multiple of Hkv.
    """
    if x.shape[2] == heads:
        return x
    if heads % x.shape[2]:
        raise ValueError(f"{heads} query heads are not a multiple of {x.shape[2]} kv heads")
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def working_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: the precision in which operators accumulate."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def rms_normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x `[..., D]` over its root mean square, times weight `[D]` or `[H, D]`, in the working precision."""
    return F.rms_norm(x.to(working_dtype(x)), x.shape[-1:], eps=eps) * weight


def zero_padding(x: torch.Tensor, mask: torch.Tensor | None, value: float = 0.0) -> torch.Tensor:
    """x `[B, T, ...]`, `value` (even where it was not finite) at the tokens where mask `[B, T]` is False."""
    if mask is None:
        return x
    return torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - 2)), x, value)


def check_inputs(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    state: object | None,
) -> None:
    """Raises ValueError where the arguments that all operators share do not fit together."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"{op}: q, k, v must be [B, T, H, D], got {[tuple(x.shape) for x in (q, k, v)]}")
    if q.shape[:2] != k.shape[:2] or k.shape[:2] != v.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{op}: shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if q.shape[1] == 0:
        raise ValueError(f"{op}: needs at least one token, got T = 0")
    for x in (k, v):
        if q.shape[2] % x.shape[2]:
            raise ValueError(f"{op}: {q.shape[2]} query heads are not a multiple of {x.shape[2]} kv heads")
    for name, value in (("mask", mask), ("documents", documents)):
        if value is not None and value.shape != q.shape[:2]:
            raise ValueError(f"{op}: {name} must be [B, T] = {tuple(q.shape[:2])}, got {tuple(value.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask must be bool (True for real tokens), got {mask.dtype}; use mask.bool()")
    if documents is not None and state is not None:
        raise ValueError(f"{op}: documents cannot be combined with an incoming state; pass state=None")


def fit_chunk(op: str, chunk_size: int, length: int) -> int:
    """The chunk to use for `length` tokens: chunk_size, or the power of two that holds a shorter row.

    Raises ValueError unless chunk_size is a positive power of two.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"{op}: chunk_size must be a positive power of two, got {chunk_size}; use 64")
    return min(chunk_size, 1 << (length - 1).bit_length())


def to_chunks(x: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """`[B, T, H, ...]` -> `[B, H, N, c, ...]`, zero-padded on the right to N * c tokens."""
    pad = -x.shape[1] % chunk_size
    if pad:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
    return x.transpose(1, 2).unflatten(2, (-1, chunk_size)).contiguous()


def from_chunks(x: torch.Tensor, length: int) -> torch.Tensor:
    """`[B, H, N, c, D]` -> `[B, T, H, D]` with T = length."""
    return x.flatten(2, 3)[:, :, :length].transpose(1, 2).contiguous()


def shifted(x: torch.Tensor, first: torch.Tensor, length: int) -> torch.Tensor:
    """`[B, length, ...]`: x `[B, T, ...]` read from the index first `[B]` on, zeros outside it."""
    index = torch.arange(length, device=x.device) + first[:, None]
    inside = (index >= 0) & (index < x.shape[1])
    taken = x[torch.arange(x.shape[0], device=x.device)[:, None], index.clamp(0, x.shape[1] - 1)]
    return torch.where(inside.reshape(*inside.shape, *[1] * (x.dim() - 2)), taken, 0)


def carry(
    updates: torch.Tensor, decay: torch.Tensor | None, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """S <- decay * S + update: the states before each chunk `[B, H, N, K, V]` and the one after the last.

    updates `[B, H, N, K, V]`, decay `[B, H, N, K or 1, 1]` over a whole chunk (None: no decay), state `[B, H, K, V]`.
    """
    decays = None if decay is None else decay.unbind(2)
    current = torch.zeros_like(updates[:, :, 0]) if state is None else state
    before = []
    for n, update in enumerate(updates.unbind(2)):
        before.append(current)
        current = (current if decays is None else current * decays[n]) + update
    return torch.stack(before, dim=2), current


def read_out(
    scores: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of a chunked recurrence: y = scores v + q S for every chunk, then S <- decay * S + k^T v.

    scores `[B, H, N, c, c]` within chunks, already causal; q `[B, H, N, c, K]` decayed from the chunk's
    start, k `[B, H, N, c, K]` decayed to the chunk's end, v `[B, H, N, c, V]`, decay `[B, H, N, K or 1, 1]`
    over a whole chunk (None: no decay), state `[B, H, K, V]`.
    Returns y `[B, H, N, c, V]` and the state after the last chunk.
    """
    before, state = carry(k.transpose(-1, -2) @ v, decay, state)
    return scores @ v + q @ before, state
