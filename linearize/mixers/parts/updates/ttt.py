"""The state is a linear model that the tokens train by gradient descent in mini-batches: TTT-linear.

    f(z; W) = z + LN(z W + b)    W_t = W - sum_s eta_s d/dW |f(k_s; W) - v_s|^2 / 2    y_t = f(q_t; W_t)

Sun et al. 2024 (arXiv:2407.04620), sections 2.3 to 2.7; s runs over the mini-batch of t up to t, W is that at its
start. Queries and keys are brought to length 1; eta = rate sigmoid(x W + b) per head. Keys and values must have the
same size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from linearize.inits.base import Constant, Init, Normal
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.decays.base import Gate
from linearize.mixers.parts.updates.base import HeadGate, Operands, Update, unit, write_scaled
from linearize.ops.ttt import ttt_linear


@dataclass(frozen=True)
class TttConfig(PartConfig):
    """Settings of test-time training."""

    type: str = "ttt"
    rate: float = 1.0
    """Largest inner learning rate."""
    batch_tokens: int = 16
    """Tokens of a mini-batch; changes results."""

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ValueError(f"update.rate must be positive, got {self.rate}")
        if not 1 <= self.batch_tokens <= 1024:
            raise ValueError(f"update.batch_tokens must lie between 1 and 1024, got {self.batch_tokens}")


class Ttt(Update):
    """See the module docstring. State: W and b at the mini-batch's start, what they have moved since, and a count."""

    Config = TttConfig
    title = "test-time training"
    routable = False
    decays = ("none",)
    linear_in_values = False

    def __init__(self, config: TttConfig, shape: HeadShape):
        super().__init__(config, shape)
        if shape.key_dim != shape.value_dim:
            raise ValueError(
                f"update 'ttt' needs as many features as value channels, got {shape.key_dim} and {shape.value_dim}"
            )
        heads, size = shape.heads, shape.key_dim
        self.rate = HeadGate(shape, 0.0)
        self.norm_weight, self.norm_bias = (nn.Parameter(torch.empty(heads, size)) for _ in range(2))
        self.start_weight = nn.Parameter(torch.empty(heads, size, size))
        self.start_bias = nn.Parameter(torch.empty(heads, size))

    def inits(self) -> dict[str, Init]:
        own: dict[str, Init] = {
            "norm_weight": Constant(1.0),
            "norm_bias": Constant(0.0),
            "start_weight": Normal(0.02),
            "start_bias": Constant(0.0),
        }
        return {**own, **super().inits()}

    def matrices(self, state: Any) -> tuple[torch.Tensor, ...]:
        W, _, dW, _, _ = state
        return (W - dW,)

    def operands(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: Gate, x: torch.Tensor) -> Operands:
        inner = (self.norm_weight, self.norm_bias, self.start_weight, self.start_bias)

        def op(q, k, v, eta, *, scale, **options):
            return ttt_linear(q, k, v, eta, *inner, batch_tokens=self.config.batch_tokens, scale=scale, **options)

        eta = self.config.rate * self.rate(x).sigmoid()
        return Operands(op, unit(q), unit(k), write_scaled(v, gate), (eta,))
