"""Attention transfer: teach each mixer to reproduce the softmax attention it replaced, layer by layer.

Each mixer sees the teacher's input of its layer and is pulled towards the teacher's output. Source: LoLCATs
(arXiv:2410.10254), section 3.1 (MSE on head outputs), Hedgehog (arXiv:2402.04347), section 4.2 (cross-entropy on
attention weights).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from linearize.errors import UserError
from linearize.losses import cosine, l2, mse, weight_cross_entropy
from linearize.mixing import mixer_columns, teacher_matrix
from linearize.stages.tuning.forced import Forced, ForcedConfig
from linearize.swap import Call, SwappedAttention, swapped


class AttentionTransferConfig(ForcedConfig):
    """Settings of the attention_transfer stage."""

    type: Literal["attention_transfer"] = "attention_transfer"
    lr: float = Field(1e-2, gt=0, description="Peak learning rate.")
    loss: Literal["mse", "l2", "cosine", "weights"] = Field(
        "mse",
        description="mse, l2 (length of the error over the root of its size) or cosine on outputs, or weights: "
        "cross-entropy on attention weights (quadratic memory).",
    )
    where: Literal["heads", "output"] = Field(
        "heads",
        description="Compare head outputs before the output projection, or the layer's output after it.",
    )
    loss_scale: float = Field(1000.0, gt=0, description="Factor on the loss; matters only where clip is set.")
    clip: float | None = Field(None, gt=0, description="Largest norm of the whole gradient; null clips nothing.")

    @model_validator(mode="after")
    def _no_request_is_ignored(self) -> AttentionTransferConfig:
        if self.loss == "weights" and self.where == "output":
            raise ValueError("loss weights compares attention weights, so where: output has no meaning; leave it out")
        return self


class AttentionTransfer(Forced):
    """See the module docstring."""

    Config = AttentionTransferConfig
    config: AttentionTransferConfig

    def prepare(self, model: Any) -> dict[str, nn.Parameter]:
        if self.config.loss == "weights":
            for attn in swapped(model).values():
                if not attn.mixer.linear_in_values:
                    raise UserError(
                        "stage attention_transfer: loss weights compares attention weights, and "
                        f"{type(attn.mixer).__name__} has none (a norm, clones, meta tokens or a convolution on its "
                        "values); use loss mse or cosine"
                    )
        return super().prepare(model)

    def target(self, attn: SwappedAttention, call: Call, heads: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self.config.loss == "weights":
            return teacher_matrix(attn, call)
        return output if self.config.where == "output" else heads

    def layer_loss(
        self, attn: SwappedAttention, call: Call, target: torch.Tensor, keep: torch.Tensor | None
    ) -> torch.Tensor:
        scale = self.config.loss_scale
        if self.config.loss == "weights":
            return weight_cross_entropy(mixer_columns(attn, call), target, keep) * scale
        y, _ = attn.heads(call.x, call.position, call.batch)
        if self.config.where == "output":
            y = attn.family.output(attn, y.flatten(-2))
        else:
            target = target.view_as(y)
        return {"mse": mse, "l2": l2, "cosine": cosine}[self.config.loss](y, target, keep) * scale
