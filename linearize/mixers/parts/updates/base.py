"""The update contract: one recurrence, with the gates that are its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from linearize.inits.base import Constant, Init
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import Calibration, Part
from linearize.mixers.parts.decays.base import Gate
from linearize.ops.layout import working_dtype

Read = tuple[torch.Tensor, torch.Tensor | None, Any]


class Operands(NamedTuple):
    """An operator of `linearize.ops` that returns (y, state), and what it takes in order."""

    op: Callable[..., tuple[torch.Tensor, Any]]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: tuple[torch.Tensor | None, ...]


class Update(Part):
    """Writes tokens into a recurrent state and reads it.

    Args:
        config: an instance of the subclass's `Config`.
        shape: sizes of the layer; `key_dim` is the number of features of a query or key.
    """

    title: ClassVar[str] = ""
    """What the recurrence is called."""
    titled_without_decay: ClassVar[bool] = False
    """Whether it is called so where nothing decays, and otherwise something else, such as gated."""
    decays: ClassVar[tuple[str, ...]]
    """Granularities of the decays that it takes: none, head, channel."""
    linear_in_values: ClassVar[bool] = True
    """Whether the read-out is a weighted sum of values, with weights that do not depend on them."""
    routable: ClassVar[bool] = True
    """Whether `operands` say all of it and a token with neutral ones changes nothing, so that a mixture of memories can
    withhold tokens from it."""
    normalizes: ClassVar[bool] = False
    """Whether it can return a denominator, the sum of all weights."""

    bidirectional: ClassVar[bool] = False
    """Whether it can sum all tokens of a row, where `shape.causal` is false and nothing decays."""

    def __init__(self, config: Any, shape: HeadShape):
        super().__init__()
        self.config = config
        self.shape = shape

    def decay_channels(self) -> int:
        """How many decays per head a decay per channel is to have; by default one per feature."""
        return self.shape.key_dim

    def matrices(self, state: Any) -> tuple[torch.Tensor, ...]:
        """The matrices [B, N, F, V] that tokens are written into, as a query reads them; by default all tensors of the
        state that have four dimensions.
        """
        return tuple(leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor) and leaf.ndim == 4)

    def operands(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: Gate, x: torch.Tensor) -> Operands:
        """What the recurrence is run on.

        Args:
            q: [B, T, Hq, F] features. k: [B, T, Hkv or Hq, F]. v: [B, T, Hkv or Hq, V].
            gate: the decay's.
            x: [B, T, C] the layer's input, for gates.
        """
        raise NotImplementedError

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gate: Gate,
        x: torch.Tensor,
        *,
        normalize: bool,
        scale: float,
        **options: Any,
    ) -> Read:
        """Run the recurrence; arguments as `operands`, and

        Args:
            normalize: whether to return the denominator.
            scale: factor on q.
            options: mask, documents, state, chunk_size and backend for the operator.

        Returns:
            y [B, T, Hq, V]; the denominator [B, T, Hq] or None; the state after.
        """
        op, q, k, v, gates = self.operands(q, k, v, gate, x)
        y, state = op(q, k, v, *gates, scale=scale, **options)
        return y, None, state


def write_scaled(v: torch.Tensor, gate: Gate) -> torch.Tensor:
    """v [B, T, H, V] times the gate's factor on what is written."""
    if gate.write is None:
        return v
    if gate.write.shape[2] != v.shape[2]:
        v = v.repeat_interleave(gate.write.shape[2] // v.shape[2], dim=2)
    return v * gate.write.unsqueeze(-1).to(v.dtype)


class HeadGate(Part):
    """One number per head and token from the layer's input: x W + bias, before whatever squashes it; W starts at
    zero. None for the bias leaves it out.
    """

    def __init__(self, shape: HeadShape, bias: float | None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.heads, shape.hidden_size))
        self.bias = None if bias is None else nn.Parameter(torch.empty(shape.heads))
        self.start = bias

    def inits(self) -> dict[str, Init]:
        bias: dict[str, Init] = {} if self.start is None else {"bias": Constant(self.start)}
        return {"weight": Constant(0.0), **bias}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, C] -> [B, T, Hq]."""
        z = F.linear(x, self.weight.to(x.dtype))
        z = z.to(working_dtype(z))
        return z if self.bias is None else z + self.bias


class WriteStrength(HeadGate):
    """beta = limit * sigmoid(x W + bias) of a delta rule, per head and token; without a bias `start` is limit / 2."""

    def __init__(self, shape: HeadShape, start: float, limit: float = 1.0, bias: bool = True):
        super().__init__(shape, math.log(start / (limit - start)) if bias else None)
        self.limit = limit

    @torch.no_grad()
    def calibrate(self, measured: Calibration) -> None:
        """0.3 for heads that attend to everything up to 0.7 for those that pick one token (Taylor-Calibrate,
        arXiv:2606.16429).
        """
        if self.bias is None:
            return
        beta = 0.3 + 0.4 * (1 - measured.entropy.double().clamp(0, 1))
        self.bias.copy_(torch.logit(beta / self.limit))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.limit * super().forward(x).sigmoid()


def unit(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] at length 1."""
    wide, size = x.to(working_dtype(x)), x.shape[-1]
    return F.rms_norm(wide, (size,), wide.new_full((size,), size**-0.5), 1e-6 / size)
