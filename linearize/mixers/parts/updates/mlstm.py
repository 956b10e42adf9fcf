"""The matrix memory of xLSTM: exponential input gate, forget gate, and a normaliser that never falls below 1.

    C_t = f_t C_{t-1} + exp(i_t) k_t v_t^T    n_t likewise with 1 for v_t    y_t = q_t C_t / max(|q_t n_t|, 1)

Beck et al. 2024 (arXiv:2405.04517), equations 19 to 27; i = x W + b per head. b starts at the logarithm of the number
of features, so that softmax features give weights near 1 and the read-out starts as a weighted mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import PartConfig
from linearize.mixers.parts.decays.base import Gate
from linearize.mixers.parts.updates.base import HeadGate, Operands, Update, write_scaled
from linearize.ops.mlstm import mlstm


@dataclass(frozen=True)
class MlstmConfig(PartConfig):
    """Settings of the matrix memory."""

    type: str = "mlstm"


class Mlstm(Update):
    """See the module docstring. State: C [B, Hq, F, V], n [B, Hq, F] and their stabiliser m [B, Hq]."""

    Config = MlstmConfig
    title = "mLSTM"
    decays = ("head",)

    def __init__(self, config: MlstmConfig, shape: HeadShape):
        super().__init__(config, shape)
        self.input = HeadGate(shape, math.log(shape.key_dim))

    def matrices(self, state: Any) -> tuple[torch.Tensor, ...]:
        C, _, m = state  # C is kept divided by exp(m), which can be beyond float32
        return (C.double() * m.double().exp()[..., None, None],)

    def operands(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: Gate, x: torch.Tensor) -> Operands:
        g = gate.log_decay
        assert g is not None
        return Operands(mlstm, q, k, write_scaled(v, gate), (g, self.input(x)))
