"""A short causal convolution on projected heads: every channel sees its last few tokens.

LAWCAT (arXiv:2509.18467) convolves q and k before a gated linear attention; Gated DeltaNet (arXiv:2412.06464) q, k and
v. Only the current token's tap is set at first, so that nothing changes, but for an activation if there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from linearize.inits.base import Init, LastTap
from linearize.mixers.base import Backend, Context, HeadShape
from linearize.mixers.parts.base import Part
from linearize.ops.conv import causal_conv


@dataclass(frozen=True)
class ConvConfig:
    """Settings of the short convolution."""

    __pydantic_config__ = {"extra": "forbid"}

    size: int = 0
    """Tokens that a channel sees, its own included; 0 for no convolution."""
    inputs: Literal["qkv", "qk", "kv", "v"] = "qkv"
    """What is convolved."""
    activation: Literal["none", "silu"] = "none"
    """What follows the convolution; silu as Gated DeltaNet has it (arXiv:2412.06464)."""

    def __post_init__(self) -> None:
        if not 0 <= self.size <= 128:
            raise ValueError(f"conv.size must lie between 0 and 128 tokens, got {self.size}")


class Taps(nn.Module):
    """The filters by input, given when called: accelerate loads offloaded weights as their module is called."""

    def __init__(self, sizes: Mapping[str, tuple[int, ...]]):
        super().__init__()
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(*size)))

    def forward(self, name: str) -> torch.Tensor:
        return self.get_parameter(name)


class Conv(Part):
    """See the module docstring. State: the last size - 1 tokens of what is convolved."""

    def __init__(self, config: ConvConfig, shape: HeadShape, backend: Backend = "auto"):
        super().__init__()
        self.inputs, self.activation, self.backend = config.inputs, config.activation, backend
        sizes = {
            "q": (shape.heads, shape.key_dim),
            "k": (shape.kv_heads, shape.key_dim),
            "v": (shape.kv_heads, shape.value_dim),
        }
        self.taps = Taps({x: (*sizes[x], config.size) for x in config.inputs})

    def inits(self) -> dict[str, Init]:
        return {f"taps.{x}": LastTap() for x in self.inputs}

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ctx: Context, state: Any, bare: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
        """q, k, v convolved (`bare`: v as it is), and the state after."""
        heads, after = {"q": q, "k": k, "v": v}, {}
        for x in self.inputs.replace("v", "") if bare else self.inputs:
            heads[x], after[x] = causal_conv(
                heads[x],
                self.taps(x).to(heads[x].dtype),
                mask=ctx.mask,
                documents=ctx.documents,
                state=None if state is None else state[x],
                backend=self.backend,
            )
            if self.activation == "silu":
                heads[x] = F.silu(heads[x])
        return heads["q"], heads["k"], heads["v"], after
