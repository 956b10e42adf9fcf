"""g = logsigmoid(k) / normalizer per channel, from the keys themselves, no parameters: Liger (arXiv:2503.01496),
equation 7.

The keys are read after any k-norm and before the rotary embedding. The paper pools them first, which for this form is
the identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.decays.base import Decay, Gate
from linearize.ops.layout import working_dtype


@dataclass(frozen=True)
class FromKConfig(PartConfig):
    """Settings of the decay from keys."""

    type: str = "from_k"
    normalizer: float = 16.0
    """Divisor of the log-gate; larger forgets more slowly."""

    def __post_init__(self) -> None:
        if not 0 < self.normalizer < math.inf:
            raise ValueError(f"decay.normalizer must be positive, got {self.normalizer}")


class FromK(Decay):
    """See the module docstring."""

    Config = FromKConfig
    granularity = "channel"

    def __init__(self, config: FromKConfig, shape: HeadShape):
        super().__init__(config, shape)

    def forward(self, x: torch.Tensor, k: torch.Tensor) -> Gate:
        return Gate(F.logsigmoid(k.to(working_dtype(k))) / self.config.normalizer)
