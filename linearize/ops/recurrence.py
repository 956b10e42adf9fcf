"""What a recurrence is here, and the one place that runs any of them.

A file of `linearize.ops` describes its recurrence by a `Recurrence`: the forms `naive` (token by token, the truth),
`chunk` (parallel), `step` (decoding) and, where fla has one, `kernel`. `run` gives every form what it needs and nothing
else: padding, packed documents, grouped heads, precision and the choice of the backend are dealt with here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from linearize.ops.backend import choose
from linearize.ops.documents import cumulative_lengths, fill_padding, positions, repack, unpack
from linearize.ops.layout import check_inputs, expand_heads, fit_chunk, working_dtype, zero_padding

Gate = torch.Tensor | None


@dataclass(frozen=True)
class Recurrence:
    """The forms of one recurrence. All of them are called with q, k, v and the gates of the public operator, in order.

    `naive(*inputs, state)`, `step(*inputs, state)` and `chunk(*inputs, state, chunk_size)` get `[B, T, H, ...]` tensors
    of one working dtype (float32 or float64) with as many heads everywhere as q has, q already scaled, k, v and gates
    neutral at padding; `state` is None or what a form returned. `step` gets a state and few tokens.
    `kernel(*inputs, scale, state, cu_seqlens)` gets q, k, v in one dtype, see `unit_keys`, and rows laid end to end
    where `cu_seqlens` is given. Each returns (outputs, state): a tensor or a tuple of tensors, twice.
    """

    name: str
    naive: Callable[..., tuple[Any, Any]]
    chunk: Callable[..., tuple[Any, Any]]
    step: Callable[..., tuple[Any, Any]]
    kernel: Callable[..., tuple[Any, Any]] | None = None
    obstacle: Callable[..., str] | None = None
    """(*inputs) -> why the kernel cannot take them, or an empty string."""
    neutral: tuple[float, ...] = ()
    """What each gate holds at padding, so that a padded token changes no state; default: zeros."""
    resets: bool = True
    """Whether the first gate is a log-decay, None for none, that forgets everything at -inf. Packed documents then stay
    in their rows; otherwise each becomes a row of its own."""
    unit_keys: bool = False
    """Whether keys are meant to have unit length. The kernel then takes q and k in the dtype of v, as 16 bits do them
    little harm; otherwise, where sums of many features matter, in the common one."""
    steps: bool = False
    """Whether k and v are `[B, T, H, n, ...]`: n steps of the recurrence for each token."""


def run(
    op: Recurrence,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: Sequence[Gate] = (),
    *,
    scale: float,
    mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    state: Any,
    chunk_size: int,
    backend: str,
) -> tuple[Any, Any]:
    """Run `op` on `[B, T, H, ...]` inputs; the public operators say what they mean.

    Returns:
        (outputs in the working dtype or, from a kernel, in the inputs'; the state in the working dtype). With documents
        the state is that of each row's last document.

    Raises:
        ValueError: for shapes that do not fit, documents with a state, or a backend that cannot be met.
    """
    k_step, v_step = (x.select(3, 0) if op.steps else x for x in (k, v))
    check_inputs(op.name, q, k_step, v_step, mask=mask, documents=documents, state=state)
    for gate in gates:
        if gate is not None and gate.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{op.name}: a gate must be [B, T, H, ...] beside q {tuple(q.shape)}, got {tuple(gate.shape)}"
            )
    chosen = "step"
    if q.shape[1] > 1 or state is None or backend not in ("auto", "torch"):
        obstacle = "" if op.obstacle is None else op.obstacle(q, k, v, *gates)
        chosen = choose(op.name, backend, q, obstacle if op.kernel is not None else "fla has no kernel for it")
    with torch.autocast(q.device.type, enabled=False):
        dtype, heads = working_dtype(q, k, v, *(g for g in gates if g is not None)), q.shape[2]
        neutral = op.neutral or (0.0,) * len(gates)
        k, v = (expand_heads(zero_padding(x, mask), heads) for x in (k, v))
        ready = [
            None if g is None else expand_heads(zero_padding(g, mask, value), heads).to(dtype)
            for g, value in zip(gates, neutral, strict=True)
        ]
        if documents is not None:
            documents = fill_padding(documents, mask)
        if chosen == "fla":
            assert op.kernel is not None
            shared = v.dtype if op.unit_keys else torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
            return _run_kernel(op.kernel, [q.to(shared), k.to(shared), v.to(shared), *ready], scale, documents, state)
        inputs = [q.to(dtype) * scale, k.to(dtype), v.to(dtype), *ready]
        if chosen == "step":
            return op.step(*inputs, state=state)

        def form(rows: list[Gate]) -> tuple[Any, Any]:
            if chosen == "naive":
                return op.naive(*rows, state=state)
            assert rows[0] is not None
            size = fit_chunk(op.name, chunk_size, rows[0].shape[1])
            return op.chunk(*rows, state=state, chunk_size=size)

        if documents is None:
            return form(inputs)
        if op.resets:
            inputs[3] = _reset(inputs[3], documents, dtype)
            return form(inputs)
        rows, layout = unpack(inputs, documents, op.neutral)
        return repack([form(row) for row in rows], layout)


def _reset(g: Gate, documents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The log-decay with -inf where a document begins: nothing before it is seen. No exponent is ever a difference."""
    index = torch.arange(documents.shape[1], device=documents.device)
    begins = (positions(documents)[1] == 0) & (index > 0)
    if g is None:
        g = torch.zeros(*documents.shape, 1, dtype=dtype, device=documents.device)
    return g.masked_fill(begins.reshape(*begins.shape, *[1] * (g.dim() - 2)), float("-inf"))


def _run_kernel(
    kernel: Callable[..., tuple[Any, Any]],
    inputs: list[Gate],
    scale: float,
    documents: torch.Tensor | None,
    state: Any,
) -> tuple[Any, Any]:
    """fla's kernel; documents become `cu_seqlens` over the rows laid end to end."""
    if documents is None:
        return kernel(*inputs, scale=scale, state=state, cu_seqlens=None)
    cu_seqlens, last = cumulative_lengths(documents)
    flat = [None if x is None else x.flatten(0, 1).unsqueeze(0) for x in inputs]
    out, states = kernel(*flat, scale=scale, state=None, cu_seqlens=cu_seqlens)
    rows = documents.shape
    return tree_map(lambda x: x.view(*rows, *x.shape[2:]), out), tree_map(lambda x: x[last], states)
