"""A composed mixer on the tokens of many requests in a row, whose states lie in slots of a pool; plain torch.

`paged(mixer, ...)` puts into a mixer's place one that differs in two parts: the convolution and the recurrence read and
write slots instead of taking and returning states, by kernels that are handed in. All else is the mixer's own code, so
that what vLLM computes is what the checkpoint does. Tensors are [1, N, ...] for N tokens of all requests together.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from linearize.mixers.base import Context, HeadShape, build_mixer
from linearize.mixers.parts.base import build
from linearize.mixers.parts.conv import Conv
from linearize.mixers.parts.decays.base import Gate
from linearize.mixers.parts.updates.base import Read, Update
from linearize.ops.layout import expand_heads
from linearize.serving.vllm.layout import Spec, local_shape, shard


class Rows(NamedTuple):
    """Which of the N tokens are whose."""

    starts: torch.Tensor
    """[R + 1] int32; request r has the tokens from starts[r] up to starts[r + 1]."""
    slots: torch.Tensor
    """[R] int32, where in the pools a request's states lie."""
    resumed: torch.Tensor | None
    """[R] bool, whether there is something in the slot yet; None where each request has one token and something."""
    hints: Any = None
    """What the kernels want to know besides."""


class Kernels(Protocol):
    """What runs on slots. Each reads the rows' slots, if they are resumed, and writes them."""

    def conv(self, x: torch.Tensor, taps: torch.Tensor, silu: bool, pool: torch.Tensor, rows: Rows) -> torch.Tensor:
        """x [N, D] convolved with taps [D, size], the current token's last, and then, if `silu`, the activation.

        `pool` is [slots, size - 1, D].
        """

    def delta(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        scale: float,
        pool: torch.Tensor,
        rows: Rows,
    ) -> torch.Tensor:
        """The delta rule of `linearize.ops.delta` for q, k [1, N, H, F] and v [1, N, H, V], g [1, N, H] or
        [1, N, H, F] and beta [1, N, H] in float32; -> [1, N, H, V]. `pool` is [slots, H, V, F].
        """

    def ssd(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dt: torch.Tensor,
        rate: torch.Tensor,
        pool: torch.Tensor,
        rows: Rows,
    ) -> torch.Tensor:
        """S_t = exp(rate dt_t) S_{t-1} + dt_t k_t v_t^T, y_t = q_t S_t; dt [1, N, H] and rate [H] <= 0 in float32, all
        else as above.
        """


class Slots(NamedTuple):
    """What the paged parts get as their state."""

    pool: torch.Tensor | None
    """None before there are pools, while vLLM measures memory: nothing is convolved, and a token reads itself."""
    rows: Rows | None
    kernels: Kernels


def paged(spec: Spec, shape: HeadShape, rank: int = 0, size: int = 1) -> Any:
    """Process `rank`'s part of a mixer, its parameters without values, of torch's default type and device.

    It is called as any mixer, with `Slots` in place of states: {"conv": ..., "linear": ...}.

    Args:
        spec: class and config of a mixer that `support.supported` has nothing against.
        shape: the whole layer's.
        rank: this process, of `size`.
    """
    settings: Any = spec[1]
    local = local_shape(shape, size)
    mixer: Any = build_mixer(*spec, local)
    if mixer.conv is not None:
        mixer.conv.forward = partial(_convolve, mixer.conv)
    if settings.update.type == "delta":
        mixer.update.forward = partial(_replace, mixer.update)
        return mixer
    mixer.update.forward = partial(_add, mixer.update, mixer.decay)
    if settings.decay.type != "scalar":  # of all heads, because constants are made for so many
        decay = build(settings.decay, shape)(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 1)).log_decay
        rate = torch.zeros(shape.heads) if decay is None else decay.flatten().float()
        mixer.update.register_buffer("rate", shard(rate, (local.heads,), rank).clone(), persistent=False)
    return mixer


def _convolve(
    conv: Conv,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ctx: Context,
    state: Slots,
    bare: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Slots]:
    """`Conv.forward` on slots, all inputs in one convolution."""
    heads = {"q": q, "k": k, "v": v}
    if state.pool is not None:
        assert state.rows is not None
        joined = torch.cat([heads[name][0].flatten(1) for name in conv.inputs], dim=-1)
        taps = torch.cat([conv.taps(name).flatten(0, 1) for name in conv.inputs]).to(joined.dtype)
        done = state.kernels.conv(joined, taps, conv.activation == "silu", state.pool, state.rows)
        parts = done.split([heads[name][0, 0].numel() for name in conv.inputs], dim=-1)
        for name, part in zip(conv.inputs, parts, strict=True):
            heads[name] = part.reshape(heads[name].shape)
    return heads["q"], heads["k"], heads["v"], state


def _replace(
    update: Update,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: Gate,
    x: torch.Tensor,
    *,
    scale: float,
    state: Slots,
    **options: Any,
) -> Read:
    """`Delta.forward` on slots."""
    heads = update.shape.heads
    _, q, k, v, (g, beta) = update.operands(q, k, v, gate, x)
    assert beta is not None  # the delta rule's
    k, v = expand_heads(k, heads), expand_heads(v, heads)
    if state.pool is None:
        return v, None, state
    assert state.rows is not None
    g = torch.zeros_like(beta) if g is None else expand_heads(g, heads)
    q, k, v = (t.to(x.dtype).contiguous() for t in (q, k, v))
    y = state.kernels.delta(q, k, v, g.float(), beta.float(), scale, state.pool, state.rows)
    return y, None, state


def _add(
    update: Any,
    decay: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: Gate,
    x: torch.Tensor,
    *,
    scale: float,
    state: Slots,
    **options: Any,
) -> Read:
    """`Additive.forward` on slots, with a decay of `rate` a head times the weight that a token is written with."""
    heads = update.shape.heads
    k, v = expand_heads(k, heads), expand_heads(v, heads)
    if state.pool is None:
        return v, None, state
    assert state.rows is not None
    rate = -decay.log_rate.float().exp() if gate.write is not None else update.rate
    dt = torch.ones_like(q[..., 0]) if gate.write is None else gate.write
    q, k, v = (t.to(x.dtype).contiguous() for t in (q * scale, k, v))
    return state.kernels.ssd(q, k, v, dt.float(), rate, state.pool, state.rows), None, state
