"""The decay contract, and half-lives, which all gates are initialised from."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn

from linearize.inits.base import Init, PerHead
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import Calibration, Part


class Gate(NamedTuple):
    """What a decay makes of a token."""

    log_decay: torch.Tensor | None
    """<= 0, [B, T, H] or [B, T, H, F], H query or key heads; None when nothing is ever forgotten."""
    write: torch.Tensor | None = None
    """Factor on what the token writes, [B, T, H]; None for 1."""


class Decay(Part):
    """Makes the log-decay of the recurrent state from the layer's input or its keys.

    Args:
        config: an instance of the subclass's `Config`.
        shape: sizes of the layer; `key_dim` is the number of features of a key.
    """

    granularity: ClassVar[Literal["none", "head", "channel"]]
    """What one decay value governs."""
    title: ClassVar[str] = "gated {}"
    """What a recurrence with this decay is called."""

    def __init__(self, config: Any, shape: HeadShape):
        super().__init__()
        self.config = config
        self.shape = shape

    def forward(self, x: torch.Tensor, k: torch.Tensor) -> Gate:
        """x [B, T, C] the layer's input, k [B, T, Hkv, K] keys before rotary embedding and feature map."""
        raise NotImplementedError


class GatedDecay(Decay):
    """A decay with a learned offset, `bias`, whose value follows from how long a head is to remember.

    `bias` is [H] or [H, F]; `offset` says which value gives a log-decay g on an average token.
    """

    bias: nn.Parameter

    @staticmethod
    def offset(log_decay: torch.Tensor, config: Any) -> torch.Tensor:
        """The bias that gives this log-decay (float64) where the input contributes nothing."""
        raise NotImplementedError

    def bias_init(self) -> Init:
        """Half-lives spread evenly in the logarithm over the heads, from the first to the last that the config
        names.
        """
        low, high = self.config.half_life
        steps = max(self.shape.heads - 1, 1)
        lives = torch.tensor([low * (high / low) ** (h / steps) for h in range(self.shape.heads)], dtype=torch.float64)
        values = self.offset(-math.log(2) / lives, self.config)
        return PerHead(tuple(values.tolist()), f"half-lives from {low:g} to {high:g} tokens over the heads")

    @torch.no_grad()
    def calibrate(self, measured: Calibration) -> None:
        """Half-life = mean attention distance of the head (Taylor-Calibrate, arXiv:2606.16429)."""
        rate = -math.log(2) / measured.distance.double().clamp(min=1.0)
        values = self.offset(rate, self.config).to(self.bias)
        self.bias.copy_(values.view(-1, *[1] * (self.bias.ndim - 1)).expand_as(self.bias))


def check_half_life(half_life: tuple[float, float]) -> None:
    """Raises ValueError unless both are positive numbers of tokens."""
    if len(half_life) != 2 or not all(0 < life < math.inf for life in half_life):
        raise ValueError(f"decay.half_life must be two positive numbers of tokens, got {list(half_life)}")


def inverse_softplus(x: torch.Tensor) -> torch.Tensor:
    """y with softplus(y) = x > 0."""
    return x + torch.log(-torch.expm1(-x))


def inverse_logsigmoid(x: torch.Tensor) -> torch.Tensor:
    """y with logsigmoid(y) = x < 0."""
    return x - torch.log(-torch.expm1(x))
