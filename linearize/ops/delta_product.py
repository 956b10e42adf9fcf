"""Several delta-rule steps per token: DeltaProduct (Siems et al. 2025, arXiv 2502.10297), gated or not.

The state's transition is a product of n (generalised) Householder matrices, so rotations and permutations are within
reach of one token. `delta_product` is the operator. Every form is that of `delta_rule` on a row n times as long.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from linearize.ops.delta import DELTA_RULE, check_gates, obstacle
from linearize.ops.recurrence import Gate, Recurrence, run

Result = tuple[torch.Tensor, torch.Tensor]


def _unroll(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: Gate, beta: torch.Tensor) -> list[Gate]:
    """The inputs of `delta_rule`, a token per step: the state decays before a token's first and is read after its last.

    q `[B, T, H, K]`, k `[B, T, H, n, K]`, v `[B, T, H, n, V]`, g `[B, T, H]`, `[B, T, H, K]` or None, beta
    `[B, T, H, n]` -> the same with n * T tokens and without the dimension n.
    """
    later = k.shape[3] - 1
    k, v, beta = (x.transpose(2, 3).flatten(1, 2) for x in (k, v, beta))
    q = F.pad(q.unsqueeze(2), (0, 0, 0, 0, later, 0)).flatten(1, 2)
    if g is not None:
        g = F.pad(g.unsqueeze(2), (0, 0) * (g.dim() - 2) + (0, later)).flatten(1, 2)
    return [q, k, v, g, beta]


def _by_steps(form: Callable[..., Result]) -> Callable[..., Result]:
    """A form of `delta_rule` on the unrolled inputs; the outputs are those after each token's last step."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: Gate, beta: torch.Tensor, **options: Any) -> Result:
        n = k.shape[3]
        out, state = form(*_unroll(q, k, v, g, beta), **options)
        return out[:, n - 1 :: n].contiguous(), state

    return call


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
    """fla's kernel for the delta rule."""
    assert DELTA_RULE.kernel is not None
    borders = None if cu_seqlens is None else cu_seqlens * k.shape[3]
    return _by_steps(DELTA_RULE.kernel)(q, k, v, g, beta, scale=scale, state=state, cu_seqlens=borders)


DELTA_PRODUCT = Recurrence(
    "delta_product",
    _by_steps(DELTA_RULE.naive),
    _by_steps(DELTA_RULE.chunk),
    _by_steps(DELTA_RULE.step),
    kernel,
    obstacle,
    unit_keys=True,
    steps=True,
)


def delta_product(
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
    """S <- diag(exp(g_t)) S, n times S <- (I - beta_tj k_tj k_tj^T) S + beta_tj k_tj v_tj^T, y_t = scale * S^T q_t.

    q `[B, T, Hq, K]`, k `[B, T, Hkv, n, K]`, v `[B, T, Hkv, n, V]`; g log-decay <= 0, `[B, T, H]` or, per key channel,
    `[B, T, H, K]`, or None for no decay; beta `[B, T, H, n]` in (0, 1), or (0, 2) for negative eigenvalues; H is Hq or
    Hkv. k is meant to have unit norm, see `delta_rule`. scale defaults to K ** -0.5; mask `[B, T]` bool, real tokens
    first in each row; documents `[B, T]` int, non-decreasing; state as returned; chunk_size in steps, a power of two.
    Returns y `[B, T, Hq, V]` in v's dtype and the state `[B, Hq, K, V]` in float32 (float64 for float64 inputs); with
    documents it is that of the row's last document. Padding changes no state; y at padding carries no meaning.
    Raises ValueError for shapes that do not fit, documents with a state, or a backend that cannot be met.
    """
    check_gates("delta_product", q, g)
    if k.dim() != 5 or v.dim() != 5 or beta.dim() != 4 or not k.shape[3] == v.shape[3] == beta.shape[3] > 0:
        raise ValueError(
            "delta_product: k, v and beta must be [B, T, H, n, K], [B, T, H, n, V] and [B, T, H, n] with one n >= 1, "
            f"got {[tuple(x.shape) for x in (k, v, beta)]}"
        )
    out, state = run(
        DELTA_PRODUCT,
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
