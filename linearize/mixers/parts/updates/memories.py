"""Several states, each of which takes in only the tokens routed to it: mixture of memories (MoM).

    y_t = sum over the active memories m of r_tm q_t S_t^m + q_t S_t^shared,    r = top-k of softmax(x W)

Du et al. 2025 (arXiv:2502.13685), section 3, on any update. Facts in different memories do not overwrite each other.
Keys and values are the layer's for all memories; the weights of the active ones sum to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from linearize.inits.base import Init, Normal
from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig, build, part
from linearize.mixers.parts.decays.base import Gate
from linearize.mixers.parts.updates.base import Read, Update
from linearize.mixers.parts.updates.delta import DeltaConfig
from linearize.ops.layout import working_dtype
from linearize.ops.memories import memories


@dataclass(frozen=True)
class MemoriesConfig(PartConfig):
    """Settings of the mixture of memories."""

    type: str = "memories"
    inner: Any = part("updates", DeltaConfig)
    """The update of each memory."""
    memories: int = 4
    """Memories that tokens are routed to."""
    active: int = 2
    """Memories that take in a token."""
    shared: bool = True
    """Whether there is one more that takes in every token."""

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.memories:
            raise ValueError(f"update.active must lie between 1 and update.memories={self.memories}, got {self.active}")
        if not self.inner.part.routable:
            raise ValueError(
                f"update.inner {self.inner.type!r} counts tokens or reads more than its state; take another"
            )


class Memories(Update):
    """See the module docstring. State: that of the inner update, with (M + 1) Hq heads."""

    Config = MemoriesConfig
    title = "mixture of memories"
    routable = False
    decays = ("none", "head", "channel")

    def __init__(self, config: MemoriesConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.inner: Update = build(config.inner, shape)
        self.decays = self.inner.decays  # type: ignore[misc]
        self.linear_in_values = self.inner.linear_in_values  # type: ignore[misc]
        self.router = nn.Parameter(torch.empty(config.memories, shape.hidden_size))

    def inits(self) -> dict[str, Init]:
        return {"router": Normal(self.shape.hidden_size**-0.5), **super().inits()}

    def decay_channels(self) -> int:
        return self.inner.decay_channels()

    def matrices(self, state: Any) -> tuple[torch.Tensor, ...]:
        return self.inner.matrices(state)

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
        z = F.linear(x, self.router.to(x.dtype))
        weights = z.to(working_dtype(z)).softmax(-1)
        top, chosen = weights.topk(self.config.active, dim=-1)
        route = torch.zeros_like(weights).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
        op, q, k, v, gates = self.inner.operands(q, k, v, gate, x)
        y, state = memories(op, q, k, v, gates, route, shared=self.config.shared, scale=scale, **options)
        return y, None, state
