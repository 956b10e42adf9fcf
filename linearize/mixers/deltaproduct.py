"""Gated DeltaProduct: several delta steps per token and a decay per head.

    S_t = prod_j (I - beta_j k_j k_j^T) exp(g_t) S_{t-1} + the writes of each step

Siems et al. 2025, DeltaProduct (arXiv:2502.10297): products of n_h Householder-like steps can permute and rotate, which
one step cannot. beta reaches 2.

Departures: it starts as Gated DeltaNet, the further steps with little weight. Traps: n_h steps cost n_h times the time;
their keys are new parameters as large as the key projection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.mixers.composed import Composed, ComposedConfig
from linearize.mixers.parts.base import part
from linearize.mixers.parts.conv import ConvConfig
from linearize.mixers.parts.decays.scalar import ScalarConfig
from linearize.mixers.parts.output import OutputConfig
from linearize.mixers.parts.updates.delta_product import DeltaProductConfig


@dataclass(frozen=True)
class DeltaproductConfig(ComposedConfig):
    """Settings of the deltaproduct mixer."""

    decay: Any = part("decays", ScalarConfig)
    update: Any = part("updates", DeltaProductConfig)
    scale: Literal["none", "sqrt"] = "sqrt"
    rope: Literal["both", "window", "recurrent", "features", "none"] = "none"
    conv: ConvConfig = field(default_factory=lambda: ConvConfig(size=4, inputs="qkv"))
    output: OutputConfig = field(default_factory=lambda: OutputConfig(norm="rms", gate="silu", scale=True))


class Deltaproduct(Composed):
    """See the module docstring."""

    Config = DeltaproductConfig
