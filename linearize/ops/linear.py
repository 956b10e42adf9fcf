"""Linear attention with its normaliser kept apart (Katharopoulos et al. 2020, arXiv 2006.16236).

`linear_attention` takes feature-mapped q and k and returns numerator, denominator and state, so that a caller
can share the denominator with another branch; `normalized` divides when there is none.
"""

import torch

from linearize.ops.backend import choose
from linearize.ops.documents import chunk_visibility, fill_padding
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

State = tuple[torch.Tensor, torch.Tensor]
Result = tuple[torch.Tensor, torch.Tensor, State]


def normalized(num: torch.Tensor, den: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """num `[B, T, H, V]` / (den `[B, T, H]` + eps), in the dtype of num."""
    return (num / (den + eps).unsqueeze(-1)).to(num.dtype)


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    documents: torch.Tensor | None = None,
    key_documents: torch.Tensor | None = None,
    state: State | None = None,
) -> Result:
    """The recurrence, token by token: S_t = S_{t-1} + k_t v_t^T, z_t = z_{t-1} + k_t; the truth, in any float
    dtype.

    Shapes as `linear_attention`, with as many kv heads as query heads.
    """
    B, T, H, F = q.shape
    S, z = state or (q.new_zeros(B, H, F, v.shape[-1]), q.new_zeros(B, H, F))
    nums, dens = [], []
    for t in range(T):
        k_t = k[:, t]
        if documents is not None and key_documents is not None:
            if t > 0:
                same = (documents[:, t] == documents[:, t - 1])[:, None, None]
                S, z = S * same[..., None], z * same
            k_t = k_t * (key_documents[:, t] == documents[:, t])[:, None, None]
        S = S + torch.einsum("bhf,bhv->bhfv", k_t, v[:, t])
        z = z + k_t
        nums.append(torch.einsum("bhf,bhfv->bhv", q[:, t], S))
        dens.append(torch.einsum("bhf,bhf->bh", q[:, t], z))
    return torch.stack(nums, dim=1), torch.stack(dens, dim=1), (S, z)


def chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    documents: torch.Tensor | None = None,
    key_documents: torch.Tensor | None = None,
    state: State | None = None,
    chunk_size: int = 64,
) -> Result:
    """The same by chunks: masked q k^T inside a chunk, the state between chunks. Arguments as `naive`.

    z is carried as one more column of S: the value 1 beside every v.
    """
    T = q.shape[1]
    size = fit_chunk("linear_attention", chunk_size, T)
    visibility = None
    if documents is not None and key_documents is not None:
        visibility = chunk_visibility(pad_documents(documents, size), pad_documents(key_documents, size), size)
    v_one = torch.cat([v, v.new_ones(*v.shape[:3], 1)], dim=-1)
    q, k, v_one = (to_chunks(x, size) for x in (q, k, v_one))
    scores = (q @ k.transpose(-1, -2)).tril()
    merged = None if state is None else torch.cat([state[0], state[1].unsqueeze(-1)], dim=-1)
    out, merged = read_out(scores, q, k, v_one, None, visibility, merged)
    out = from_chunks(out, T)
    return out[..., :-1], out[..., -1], (merged[..., :-1], merged[..., -1])


def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: State) -> Result:
    """A few tokens (decoding: one) from a state. Arguments as `naive`."""
    S, z = state
    nums, dens = [], []
    for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):
        S = S + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        z = z + k_t
        nums.append((q_t.unsqueeze(-2) @ S).squeeze(-2))
        dens.append((q_t * z).sum(-1))
    return torch.stack(nums, dim=1), torch.stack(dens, dim=1), (S, z)


def _fla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: State | None) -> Result:
    """fla's kernel for the numerator; the denominator is q . cumsum(k), in float32."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        raise ValueError(
            f"linear_attention: the fla kernels cannot be imported ({error}); use backend 'torch'"
        ) from error
    S, z = state or (None, None)
    num, S = chunk_simple_gla(q, k, v, scale=1.0, initial_state=S, output_final_state=True)
    keys = k.float().cumsum(dim=1)
    if z is not None:
        keys = keys + z.unsqueeze(1)
    return num, (q.float() * keys).sum(-1), (S, keys[:, -1])


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    key_documents: torch.Tensor | None = None,
    state: State | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Result:
    """Causal linear attention, unnormalised and without scale: num_t = sum_{i<=t} (q_t . k_i) v_i.

    q `[B, T, Hq, F]`, k `[B, T, Hkv, F]` are feature-mapped, v `[B, T, Hkv, V]`; mask `[B, T]` bool, real
    tokens first in each row; documents `[B, T]` int of the queries and key_documents of the keys (default:
    the same; they may lag behind); state as returned; chunk_size in tokens, a power of two.
    Returns num `[B, T, Hq, V]`, den `[B, T, Hq]` = sum_{i<=t} q_t . k_i and the state (S `[B, Hq, F, V]`,
    z `[B, Hq, F]`), all in float32 (float64 for float64 inputs): num grows with T and overflows float16 before it
    is divided by den. With documents the state is that of the row's last document. Padding changes no state; num
    and den at padding carry no meaning.
    Raises ValueError for shapes that do not fit, documents with a state, or a backend that cannot be met.
    """
    check_inputs("linear_attention", q, k, v, mask=mask, documents=documents, state=state)
    if key_documents is not None and documents is None:
        raise ValueError("linear_attention: key_documents needs documents; pass both or neither")
    chosen = "step"
    if q.shape[1] > 1 or state is None or backend not in ("auto", "torch"):
        unsupported = "" if documents is None else "the linear attention kernel knows no documents"
        chosen = choose("linear_attention", backend, q, unsupported)
    with torch.autocast(q.device.type, enabled=False):
        dtype, heads = working_dtype(q, k, v), q.shape[2]
        if documents is not None:
            key_documents = fill_padding(documents if key_documents is None else key_documents, mask)
            documents = fill_padding(documents, mask)
        k, v = (expand_heads(zero_padding(x, mask), heads) for x in (k, v))
        if chosen == "fla":
            shared = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
            num, den, state = _fla(q.to(shared), k.to(shared), v.to(shared), state)
        else:
            q, k, v = (x.to(dtype) for x in (q, k, v))
            if chosen == "step" and state is not None:
                num, den, state = step(q, k, v, state)
            elif chosen == "naive":
                num, den, state = naive(q, k, v, documents=documents, key_documents=key_documents, state=state)
            else:
                num, den, state = chunk(
                    q,
                    k,
                    v,
                    documents=documents,
                    key_documents=key_documents,
                    state=state,
                    chunk_size=chunk_size,
                )
        return num.to(dtype), den, state
