"""Attention transfer: teach each mixer to reproduce the softmax attention it replaced, layer by layer.

The teacher's hidden states run through the whole model; inside each swapped layer the mixer sees the teacher's input
and is pulled towards the teacher's output, which is what goes on to the next layer. Each layer's loss is
backpropagated on the spot, so only one layer's graph is alive at a time. Source: LoLCATs (arXiv:2410.10254), section
3.1 (MSE on head outputs), Hedgehog (arXiv:2402.04347), section 4.2 (cross-entropy on attention weights).
"""

from __future__ import annotations

import fnmatch
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from linearize.batch import reordered
from linearize.errors import UserError
from linearize.losses import cosine, l2, mse, weight_cross_entropy
from linearize.stages.base import Stage, select
from linearize.swap import Call, SwappedAttention, source_weights, swapped
from linearize.teacher import run_teacher, teacher_logits
from linearize.training.config import TrainingConfig
from linearize.training.loop import Batch, Metrics


class AttentionTransferConfig(TrainingConfig):
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
    train: list[str] = Field(
        ["*.mixer.*"],
        description="Shell-style patterns of the parameters to train: those of mixers, and of projections of "
        "swapped layers, such as '*.self_attn.*'; what other layers hold is left out.",
    )

    @model_validator(mode="after")
    def _no_request_is_ignored(self) -> AttentionTransferConfig:
        if self.loss == "weights" and self.where == "output":
            raise ValueError("loss weights compares attention weights, so where: output has no meaning; leave it out")
        if self.gradient_checkpointing:
            raise ValueError(
                "attention_transfer never holds more than one layer's activations, so gradient_checkpointing would "
                "save nothing; leave it out"
            )
        return self


class AttentionTransfer(Stage):
    """See the module docstring."""

    Config = AttentionTransferConfig
    end_to_end = False
    dropout = False  # the teacher's targets are to be exact
    needs_teacher = True
    config: AttentionTransferConfig

    def check(self, model: Any) -> None:
        self.check_patterns(self.prepare(model))

    def prepare(self, model: Any) -> dict[str, nn.Parameter]:
        mixers = {type(attn.mixer).__name__: next(attn.mixer.parameters(), None) for attn in swapped(model).values()}
        if self.config.train == ["*.mixer.*"] and all(parameter is None for parameter in mixers.values()):
            raise UserError(
                f"stage attention_transfer has nothing to train: {', '.join(sorted(mixers))} adds no parameters; "
                "remove the stage"
            )
        if self.config.loss == "weights":
            for attn in swapped(model).values():
                if not attn.mixer.linear_in_values:
                    raise UserError(
                        "stage attention_transfer: loss weights compares attention weights, and "
                        f"{type(attn.mixer).__name__} has none (a norm, clones, meta tokens or a convolution on its "
                        "values); use loss mse or cosine"
                    )
        places = tuple(f"{name}." for name in swapped(model))
        chosen = select(model, self.config.train, "attention_transfer")
        inside = {name: p for name, p in chosen.items() if name.startswith(places)}
        for pattern in self.config.train:
            if not fnmatch.filter(inside, pattern):
                raise UserError(
                    f"stage attention_transfer trains swapped layers' attention only, and pattern {pattern!r} matches "
                    f"nothing there; use '*.mixer.*' or patterns such as '{places[0]}*', and train the rest in a "
                    "later stage"
                )
        return inside

    def backward(self, model: Any, batch: Batch, weight: float) -> Metrics:
        metrics: Metrics = {}
        weights = source_weights(model)
        mask = batch.get("attention_mask")
        keep = None if mask is None else mask.bool()

        def train(name: str, attn: SwappedAttention, call: Call, heads: torch.Tensor, output: torch.Tensor) -> None:
            teacher = output if self.config.where == "output" else heads
            with torch.enable_grad(), weights.as_trained():
                loss = self.layer_loss(attn, call, teacher, keep)
                (loss * (weight * self.config.loss_scale)).backward()
            metrics[f"layer_{attn.layer_idx}"] = loss.detach() * self.config.loss_scale

        with torch.no_grad():
            run_teacher(model, {k: v for k, v in batch.items() if k != "labels"}, train)
        metrics["loss"] = torch.stack(list(metrics.values())).mean()
        return metrics

    def layer_loss(
        self, attn: SwappedAttention, call: Call, teacher: torch.Tensor, keep: torch.Tensor | None
    ) -> torch.Tensor:
        """Summed loss of one layer.

        Args:
            attn: the swapped attention.
            call: what the teacher's attention was given.
            teacher: head outputs [B, T, Hq * V], or the layer's output [B, T, C] where the config says "output".
            keep: [B, T] real tokens, or None.
        """
        if self.config.loss == "weights":
            return weight_cross_entropy(*self._weights(attn, call), keep)
        y, _ = attn.heads(call.x, call.position, call.batch)
        if self.config.where == "output":
            y = attn.family.output(attn, y.flatten(-2))
        else:
            teacher = teacher.view_as(y)
        return {"mse": mse, "l2": l2, "cosine": cosine}[self.config.loss](y, teacher, keep)

    def _weights(self, attn: SwappedAttention, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Student's and teacher's attention weights [B, Hq, T, T]; the student's by mixing one-hot values."""
        rows, tokens = call.x.shape[:2]
        one_hot = torch.eye(tokens, device=call.x.device, dtype=call.x.dtype)[None, :, None, :]
        values = one_hot.expand(rows, -1, attn.mixer.shape.kv_heads, -1)
        student, _ = attn.heads(call.x, call.position, call.batch, values=values)
        with torch.no_grad():
            teacher = teacher_logits(attn, call).softmax(-1)
            if call.batch.inverse is not None:  # rows and columns back to where the batch has them
                rows_back = reordered(teacher.permute(0, 2, 3, 1), call.batch.inverse)
                teacher = reordered(rows_back.transpose(1, 2), call.batch.inverse).permute(0, 3, 2, 1)
        return student.transpose(1, 2), teacher
