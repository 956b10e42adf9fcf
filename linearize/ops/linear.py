"""Linear attention with its normaliser kept apart (Katharopoulos et al. 2020, arXiv 2006.16236), and any decay.

`linear_attention` takes feature-mapped q and k and returns numerator, denominator and state, so that a caller
can share the denominator with another branch; `normalized` divides when there is none. `bidirectional_linear_attention`
is the same for encoders. The normaliser is one more
column of the values, always 1, in the recurrences `simple_gla` and `gla`.
"""

from collections.abc import Callable
from typing import Any

import torch

from linearize.ops.gla import GLA
from linearize.ops.layout import check_inputs, expand_heads, fit_chunk, working_dtype, zero_padding
from linearize.ops.recurrence import Gate, Recurrence, run
from linearize.ops.simple_gla import SIMPLE_GLA

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
    """fla's kernels for the numerator; without a decay the denominator comes from chunks in float32, with no [T, F]
    sum.
    """
    if g is not None:
        return _with_ones("kernel")(q, k, v, g, state=state, scale=scale, cu_seqlens=cu_seqlens)
    assert SIMPLE_GLA.kernel is not None
    S, z = (None, None) if state is None else (state[0], state[1].unsqueeze(-1))
    num, S = SIMPLE_GLA.kernel(q, k, v, None, scale=scale, state=S, cu_seqlens=cu_seqlens)
    q, k = q.float(), k.float()
    ones, resets = k.new_ones(*k.shape[:3], 1), None
    if cu_seqlens is not None:
        resets = k.new_zeros(1, k.shape[1], 1)
        resets[:, cu_seqlens[1:-1]] = float("-inf")
    den, z = SIMPLE_GLA.chunk(q, k, ones, resets, state=z, chunk_size=fit_chunk("linear_attention", 64, k.shape[1]))
    if cu_seqlens is not None:
        document = torch.repeat_interleave(cu_seqlens.diff())
        z = k.new_zeros(len(cu_seqlens) - 1, *k.shape[2:]).index_add(0, document, k[0]).unsqueeze(-1)
    return (num, den.squeeze(-1) * scale), (S, z.squeeze(-1))


LINEAR = Recurrence("linear_attention", naive, chunk, step, kernel)


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
    if g is not None and (g.dim() not in (3, 4) or (g.dim() == 4 and g.shape[3] != q.shape[3])):
        raise ValueError(
            f"linear_attention: g must be [B, T, H] or [B, T, H, F], got {tuple(g.shape)} beside q {tuple(q.shape)}"
        )
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
    exact = working_dtype(num, den)  # a kernel returns both in its inputs' dtype
    return num.to(exact), den.to(exact), state


def bidirectional_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None = None
) -> Pair:
    """Linear attention over all tokens of a row, in linear time (Katharopoulos et al. 2020, arXiv 2006.16236, section
    3.2): num_t = sum_i (q_t . k_i) v_i, den_t = sum_i q_t . k_i.

    q `[B, T, Hq, F]`, k `[B, T, Hkv, F]` are feature-mapped, v `[B, T, Hkv, V]`; mask `[B, T]` bool, real tokens first
    in each row. Returns num `[B, T, Hq, V]` and den `[B, T, Hq]` in float32 (float64 for float64 inputs).
    Raises ValueError for shapes that do not fit.
    """
    check_inputs("bidirectional_linear_attention", q, k, v, mask=mask, documents=None, state=None)
    with torch.autocast(q.device.type, enabled=False):
        dtype, heads = working_dtype(q, k, v), q.shape[2]
        q, k, v = q.to(dtype), zero_padding(k, mask).to(dtype), zero_padding(v, mask).to(dtype)
        k, v = expand_heads(k, heads), expand_heads(v, heads)  # before any product, so that bits are those of one form
        S = torch.einsum("bthf,bthv->bhfv", k, v)
        return torch.einsum("bthf,bhfv->bthv", q, S), (q * k.sum(1, keepdim=True)).sum(-1)
