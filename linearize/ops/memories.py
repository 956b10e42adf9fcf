"""Mixture of memories: several states of one recurrence, each of which takes in only the tokens routed to it.

Source: Du et al. 2025, arXiv 2502.13685, section 3. `memories` runs any operator of `linearize.ops` that returns (y,
state) and leaves the state as it is where keys, values and gates are neutral: `simple_gla`, `gla`, the delta rules,
`dplr`, `gsa`, `mlstm`. Not `log_linear` and `ttt_linear`: they count all tokens, also those a memory does not take in.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from linearize.ops.layout import zero_padding


def memories(
    op: Callable[..., tuple[torch.Tensor, Any]],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: Sequence[torch.Tensor | None],
    route: torch.Tensor,
    *,
    neutral: Sequence[float] = (),
    shared: bool = False,
    own: bool = False,
    mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, Any]:
    """y_t = sum_m route_tm y_t^m, y_t^m what `op` reads for q_t from memory m, updated only where route_tm != 0.

    q, k, v and gates as `op(q, k, v, *gates, mask=..., **options)` takes them, `[B, T, H, ...]`; with own=True, k, v
    and gates are `[B, T, M, H, ...]` (M + 1 if shared), one for each memory, as in the paper. route `[B, T, M]` are the
    weights of the memories, 0 for those that a token does not activate (the caller chooses them, for instance the top
    k of a softmax). shared=True adds a last memory that all tokens update and read with weight 1. neutral: what each
    gate holds where nothing is to change, by default 0, which is right for log-decays and betas; -inf for `mlstm`'s i.
    Returns y `[B, T, Hq, V]` in v's dtype and op's state, with M * Hq heads (memory m's are m * Hq and following), to
    be passed as `state`. Costs as much as M times the heads, whatever is routed where.
    Gradients: d y / d route_tm is the read y_t^m, for inactive memories as well (what they would have given); none goes
    through the choice of the active ones. Zeros that come from a mask or a scatter of the top k stop it there.
    Raises ValueError for shapes that do not fit, and what `op` raises.
    """
    if route.dim() != 3 or route.shape[:2] != q.shape[:2]:
        raise ValueError(f"memories: route must be [B, T, M], got {tuple(route.shape)} beside q {tuple(q.shape)}")
    route = zero_padding(route, mask)
    if shared:
        route = torch.cat([route, torch.ones_like(route[..., :1])], dim=-1)
    active, M = route != 0, route.shape[-1]
    if own and k.shape[2] != M:
        raise ValueError(f"memories: with own=True k, v and gates must be [B, T, {M}, H, ...], got k {tuple(k.shape)}")

    def folded(x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """`[B, T, M * H, ...]`, `value` where a memory takes nothing in."""
        x = x if own else x.unsqueeze(2)
        return torch.where(active.reshape(*active.shape, *[1] * (x.dim() - 3)), x, value).flatten(2, 3)

    # Memories before heads, so that op finds query head h's kv head h // G within each memory.
    queries = q.unsqueeze(2).expand(-1, -1, M, -1, -1).flatten(2, 3)
    fills = neutral or (0.0,) * len(gates)
    ready = [None if g is None else folded(g, value) for g, value in zip(gates, fills, strict=True)]
    reads, state = op(queries, folded(k), folded(v), *ready, mask=mask, **options)
    y = (reads.unflatten(2, (M, -1)) * route[..., None, None]).sum(2)
    return y.to(v.dtype), state
