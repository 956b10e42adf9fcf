"""The contract of what combines the softmax window with the recurrent branch."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch

from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import Part


class Window(NamedTuple):
    """What the softmax window read."""

    out: torch.Tensor
    """[B, T, Hq, V]."""
    lse: torch.Tensor
    """[B, T, Hq] logarithm of the sum of its weights."""
    peak: torch.Tensor
    """[B, T, Hq] largest score."""


class Memory(NamedTuple):
    """What the recurrent branch read."""

    out: torch.Tensor
    """[B, T, Hq, V], not divided by `den`."""
    den: torch.Tensor | None
    """[B, T, Hq] the sum of its weights, where the combination asked for it."""


class Combine(Part):
    """Makes one output of two branches.

    Args:
        config: an instance of the subclass's `Config`.
        shape: sizes of the layer.
    """

    shares_denominator: ClassVar[bool] = False
    """Whether it needs the recurrent branch's numerator and denominator, and that branch leaves out the window's
    tokens.
    """

    def __init__(self, config: Any, shape: HeadShape):
        super().__init__()
        self.config = config
        self.shape = shape

    def window_weight(self, window: Window, memory: Memory, x: torch.Tensor) -> torch.Tensor | None:
        """[B, T, Hq] the factor on the window's output in what `forward` returns, arguments as there; the rest of it is
        the recurrent branch's. None where a combination does not say.
        """
        return None

    def forward(self, window: Window, memory: Memory, x: torch.Tensor) -> torch.Tensor:
        """[B, T, Hq, V]; x [B, T, C] is the layer's input."""
        raise NotImplementedError
