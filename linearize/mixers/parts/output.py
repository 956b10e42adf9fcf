"""What follows the read-out of a recurrent branch: a norm per head, a gate from the layer's input, a scale per head.

Group norm and RMS norm as in RetNet (arXiv:2307.08621), SUPRA (arXiv:2405.06640) and Gated DeltaNet (arXiv:2412.06464);
a sigmoid gate as in HALO (arXiv:2601.22156) and KDA (arXiv:2510.26692). A gate starts at exactly 1 with a gradient
path: its projection is zero, and so is neither its output nor its gradient. A silu gate without a bias cannot, for
silu(0) = 0: its projection starts random, and the gate anywhere around 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from linearize.inits.base import Constant, Init, Normal
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import Part
from linearize.ops.layout import rms_normed, working_dtype

SILU_OF_ONE = 1.278464542761074
"""x with silu(x) = 1."""


@dataclass(frozen=True)
class OutputConfig:
    """Settings of the recurrent branch's output."""

    __pydantic_config__ = {"extra": "forbid"}

    norm: Literal["none", "rms", "group"] = "none"
    """Norm over the channels of a head; group also subtracts their mean."""
    gate: Literal["none", "sigmoid", "silu"] = "none"
    """Gate per channel from the layer's input; sigmoid is doubled, so that it can start at 1."""
    gate_rank: int | None = None
    """Rank of the gate's projection; null for a full matrix."""
    gate_bias: bool = True
    """Whether the gate has a bias, with which it starts at 1; a silu gate without one starts random."""
    scale: bool = False
    """Whether each head has a learned factor, 1 at first or set by the calibrated init."""
    eps: float = 1e-5
    """What the norm adds to the mean square before the root."""

    def __post_init__(self) -> None:
        if self.gate_rank is not None and self.gate_rank < 1:
            raise ValueError(f"output.gate_rank must be at least 1, got {self.gate_rank}")
        if not self.eps > 0:
            raise ValueError(f"output.eps must be a positive number, got {self.eps}")


class Output(Part):
    """See the module docstring."""

    def __init__(self, config: OutputConfig, shape: HeadShape):
        super().__init__()
        self.config = config
        self.hidden_size = shape.hidden_size
        heads, size = shape.heads, shape.value_dim
        if config.norm != "none":
            self.norm_weight = nn.Parameter(torch.empty(heads, size))
        if config.gate != "none":
            if config.gate_rank is not None:
                self.gate_down = nn.Parameter(torch.empty(config.gate_rank, shape.hidden_size))
            self.gate_up = nn.Parameter(torch.empty(heads, size, config.gate_rank or shape.hidden_size))
            if config.gate_bias:
                self.gate_bias = nn.Parameter(torch.empty(heads, size))
        if config.scale:
            self.scale = nn.Parameter(torch.empty(heads))

    def inits(self) -> dict[str, Init]:
        silu = self.config.gate == "silu"
        shut = silu and not self.config.gate_bias
        every: dict[str, Init] = {
            "norm_weight": Constant(1.0),
            "gate_down": Normal(self.hidden_size**-0.5),
            "gate_up": Normal((self.config.gate_rank or self.hidden_size) ** -0.5) if shut else Constant(0.0),
            "gate_bias": Constant(SILU_OF_ONE if silu else 0.0),
            "scale": Constant(1.0),
        }
        return {name: every[name] for name, _ in self.named_parameters()}

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y [B, T, Hq, V] normed, gated and scaled; x [B, T, C] is the layer's input."""
        config = self.config
        y = y.to(working_dtype(y))
        scale = self.scale.to(y.dtype).unsqueeze(-1) if config.scale else None
        if config.norm != "none":
            if config.norm == "group":
                y = y - y.mean(-1, keepdim=True)
            y = rms_normed(y, self.norm_weight if scale is None else self.norm_weight * scale, config.eps)
        elif scale is not None:
            y = y * scale
        if config.gate != "none":
            z = x if config.gate_rank is None else F.linear(x, self.gate_down.to(x.dtype))
            z = torch.einsum("btr,hvr->bthv", z, self.gate_up.to(z.dtype)).to(y.dtype)
            z = z + self.gate_bias if config.gate_bias else z
            y = y * (F.silu(z) if config.gate == "silu" else 2 * z.sigmoid())
        return y
