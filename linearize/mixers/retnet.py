"""RetNet: a fixed decay per head, a group norm and a swish gate.

    S_t = gamma_h S_{t-1} + k_t v_t^T    y_t = silu(x_t W_g + b) * group_norm(q_t S_t)

Sun et al. 2023, Retentive Network (arXiv:2307.08621), section 2. Rotary embedding on both, q scaled by 1 / sqrt(d).

Departures: half-lives between 22 and 355 tokens evenly in the logarithm, as in the released code; the gate starts at 1.
Traps: a fixed decay forgets facts at a fixed distance whatever is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.decays.fixed import FixedConfig
from linearize.mixers.parts.output import OutputConfig


@dataclass(frozen=True)
class RetnetConfig(ComposedConfig):
    """Settings of the retnet mixer."""

    decay: Any = part("decays", FixedConfig, schedule="retnet")
    scale: Literal["none", "sqrt"] = "sqrt"
    output: OutputConfig = field(default_factory=lambda: OutputConfig(norm="group", gate="silu", scale=True))


class Retnet(Composed):
    """See the module docstring."""

    Config = RetnetConfig
