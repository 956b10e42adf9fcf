"""Linear attention with its normaliser kept apart (Katharopoulos et al. 2020, arXiv 2006.16236), and any decay.

`linear_attention` takes feature-mapped q and k and returns numerator, denominator and state, so that a caller
can share the denominator with another branch; `normalized` divides when there is none. The normaliser is one more
column of the values, always 1, in the recurrences `simple_gla` and `gla`.
"""

from collections.abc import Callable
from typing import Any

import torch

from linearize.ops.gla import GLA
from linearize.ops.recurrence import Gate, Recurrence, run
from linearize.ops.simple_gla import SIMPLE_GLA, obstacle

State = tuple[torch.Tensor, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]
Result = tuple[torch.Tensor, torch.Tensor, State]


def normalized(num: torch.Tensor, den: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """num `[B, T, H, V]` / (den `[B, T, H]` + eps), in the dtype of num."""
    return (num / (den + eps).unsqueeze(-1)).to(num.dtype)


def _with_ones(form: str) -> Callable[..., tuple[Pair, State]]:
    """The form of `simple_gla` or, for a decay per channel, `gla`, on values with a column of ones."""

    def call(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: Gate, *, state: State | None, **options: Any
    ) -> tuple[Pair, State]:
        op = SIMPLE_GLA if g is None or g.dim() == 3 else GLA
        v_one = torch.cat([v, v.new_ones(*v.shape[:3], 1)], dim=-1)
        merged = None if state is None else torch.cat([state[0], state[1].unsqueeze(-1)], dim=-1)
        out, merged = getattr(op, form)(q, k, v_one, g, state=merged, **options)
        return (out[..., :-1], out[..., -1]), (merged[..., :-1], merged[..., -1])

    return call


naive, chunk, step = _with_ones("naive"), _with_ones("chunk"), _with_ones("step")


def kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: Gate,
    *,
    scale: float,
    state: State | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[Pair, State]:
    """fla's kernels; without a decay the denominator is q . cumsum(k), in float32."""
    if g is not None:
        return _with_ones("kernel")(q, k, v, g, state=state, scale=scale, cu_seqlens=cu_seqlens)
    assert SIMPLE_GLA.kernel is not None
    S, z = state or (None, None)
    num, S = SIMPLE_GLA.kernel(q, k, v, None, scale=scale, state=S, cu_seqlens=cu_seqlens)
    keys = k.float().cumsum(dim=1)
    if z is not None:
        keys = keys + z.unsqueeze(1)
    if cu_seqlens is None:
        return (num, (q.float() * keys).sum(-1) * scale), (S, keys[:, -1])
    sizes = cu_seqlens.diff()
    before = torch.cat([torch.zeros_like(keys[0, :1]), keys[0, cu_seqlens[1:-1] - 1]])  # [documents, H, F]
    ends = keys[0, cu_seqlens[1:] - 1] - before
    keys = keys - before.repeat_interleave(sizes, dim=0)
    return (num, (q.float() * keys).sum(-1) * scale), (S, ends)


LINEAR = Recurrence("linear_attention", naive, chunk, step, kernel, obstacle)


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    state: State | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Result:
    """Causal linear attention, unnormalised and without scale: num_t = sum_{i<=t} (q_t . D_ti k_i) v_i.

    q `[B, T, Hq, F]`, k `[B, T, Hkv, F]` are feature-mapped, v `[B, T, Hkv, V]`; g is the log-decay <= 0 per head `[B,
    T, H]` or channel `[B, T, H, F]`, D_ti = diag(exp(g_{i+1} + ... + g_t)), None for no decay; mask `[B, T]` bool, real
    tokens first in each row; documents `[B, T]` int; state as returned; chunk_size in tokens, a power of two.
    Returns num `[B, T, Hq, V]`, den `[B, T, Hq]` = sum_{i<=t} q_t . D_ti k_i and the state (S `[B, Hq, F, V]`,
    z `[B, Hq, F]`), all in float32 (float64 for float64 inputs): num grows with T and overflows float16 before it
    is divided by den. With documents the state is that of the row's last document. Padding changes no state; num
    and den at padding carry no meaning.
    Raises ValueError for shapes that do not fit, documents with a state, or a backend that cannot be met.
    """
    (num, den), state = run(
        LINEAR,
        q,
        k,
        v,
        (g,),
        scale=1.0,
        mask=mask,
        documents=documents,
        state=state,
        chunk_size=chunk_size,
        backend=backend,
    )
    return num.to(den.dtype), den, state
