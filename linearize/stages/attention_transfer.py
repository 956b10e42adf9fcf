"""Attention transfer: teach each mixer to reproduce the softmax attention it replaced, layer by layer.

The teacher's hidden states run through the whole model; inside each swapped layer the mixer sees the teacher's input
and is pulled towards the teacher's output, which is what goes on to the next layer. Each layer's loss is
backpropagated on the spot, so only one layer's graph is alive at a time. Source: LoLCATs (arXiv:2410.10254), section
3.1 (MSE on head outputs), Hedgehog (arXiv:2402.04347), section 4.2 (cross-entropy on attention weights).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from linearize.errors import UserError
from linearize.losses import cosine, mse, weight_cross_entropy
from linearize.ops.layout import expand_heads
from linearize.stages.base import Stage, select
from linearize.swap import Batch as LayerBatch
from linearize.swap import SwappedAttention, swapped, teacher_path
from linearize.training.config import TrainingConfig
from linearize.training.loop import Batch, Metrics


class AttentionTransferConfig(TrainingConfig):
    """Settings of the attention_transfer stage."""

    type: Literal["attention_transfer"] = "attention_transfer"
    lr: float = Field(1e-2, gt=0, description="Peak learning rate.")
    loss: Literal["mse", "cosine", "weights"] = Field(
        "mse",
        description="mse or cosine on outputs, or weights: cross-entropy on attention weights (quadratic memory).",
    )
    where: Literal["heads", "output"] = Field(
        "heads",
        description="Compare head outputs before the output projection, or the layer's output after it.",
    )
    loss_scale: float = Field(1000.0, gt=0, description="Factor on the loss; matters only where clip is set.")
    clip: float | None = Field(None, gt=0, description="Largest norm of the whole gradient; null clips nothing.")
    train: list[str] = Field(["*.mixer.*"], description="Shell-style patterns of the parameters to train.")

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
    config: AttentionTransferConfig

    def check(self, model: Any) -> None:
        self.prepare(model)

    def prepare(self, model: Any) -> dict[str, nn.Parameter]:
        mixers = {type(attn.mixer).__name__: next(attn.mixer.parameters(), None) for attn in swapped(model).values()}
        if all(parameter is None for parameter in mixers.values()):
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
        chosen = select(model, self.config.train, "attention_transfer")
        if shared := [name for name in chosen if ".mixer." not in name]:
            raise UserError(
                f"stage attention_transfer trains mixers only, but train matches {shared[0]!r}, which the teacher "
                "shares; use patterns such as '*.mixer.*' here, and train the rest in a finetune stage"
            )
        return chosen

    def backward(self, model: Any, batch: Batch, weight: float) -> Metrics:
        metrics: Metrics = {}
        hooks = []
        for attn in swapped(model).values():
            probe = _Probe(self, weight, batch.get("attention_mask"), metrics)
            if self.config.where == "heads":
                hooks.append(self.family.output_projection(attn).register_forward_pre_hook(probe.see_heads))
            hooks.append(attn.register_forward_hook(probe.see_layer, with_kwargs=True))
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        try:
            with teacher_path(model), torch.no_grad():
                self.family.base_model(model)(**inputs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        metrics["loss"] = torch.stack(list(metrics.values())).mean()
        return metrics

    def layer_loss(
        self,
        attn: SwappedAttention,
        x: torch.Tensor,
        position_embeddings: Any,
        batch: LayerBatch,
        teacher: torch.Tensor,
        keep: torch.Tensor | None,
    ) -> torch.Tensor:
        """Summed loss of one layer.

        Args:
            attn: the swapped attention.
            x: [B, T, C] the teacher's input to it.
            position_embeddings: cos and sin as the model hands them to attention.
            batch: padding and documents.
            teacher: head outputs [B, T, Hq * V], or the layer's output [B, T, C] where the config says "output".
            keep: [B, T] real tokens, or None.
        """
        if self.config.loss == "weights":
            return weight_cross_entropy(*self._weights(attn, x, position_embeddings, batch), keep)
        y, _ = attn.heads(x, position_embeddings, batch)
        if self.config.where == "output":
            y = self.family.output_projection(attn)(y.flatten(-2))
        else:
            teacher = teacher.view_as(y)
        return {"mse": mse, "cosine": cosine}[self.config.loss](y, teacher, keep)

    def _weights(
        self, attn: SwappedAttention, x: torch.Tensor, position_embeddings: Any, batch: LayerBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Student's and teacher's attention weights [B, Hq, T, T]; the student's by mixing one-hot values."""
        q, k, v = self.family.project(attn, x)
        rows, tokens = x.shape[:2]
        one_hot = torch.eye(tokens, device=x.device, dtype=v.dtype)[None, :, None, :]
        student, _ = attn.heads(x, position_embeddings, batch, values=one_hot.expand(rows, -1, k.shape[2], -1))
        with torch.no_grad():
            q, k = self.family.rotate(q, k, *position_embeddings)
            scores = torch.einsum("bihd,bjhd->bhij", q.float(), expand_heads(k, q.shape[2]).float())
            place = torch.arange(tokens, device=x.device)
            visible = (place[:, None] >= place[None, :])[None]
            if batch.documents is not None:
                visible = visible & (batch.documents[:, :, None] == batch.documents[:, None, :])
            scores = (scores * attn.mixer.shape.scale).masked_fill(~visible[:, None], float("-inf"))
        return student.transpose(1, 2), scores.softmax(-1)


class _Probe:
    """The hooks on one layer during one forward pass: they catch the teacher's outputs and train the mixer on them."""

    def __init__(self, stage: AttentionTransfer, weight: float, mask: torch.Tensor | None, metrics: Metrics):
        self.stage, self.weight, self.metrics = stage, weight, metrics
        self.keep = None if mask is None else mask.bool()
        self.heads: torch.Tensor | None = None

    def see_heads(self, module: nn.Module, args: tuple) -> None:
        """Before the output projection: remember the teacher's heads."""
        self.heads = args[0]

    def see_layer(self, attn: Any, args: tuple, kwargs: dict, output: tuple) -> None:
        """After the teacher's attention: run the mixer on the same input, with gradients, and backpropagate."""
        x = args[0] if args else kwargs["hidden_states"]
        teacher = output[0] if self.heads is None else self.heads
        self.heads = None  # a reference that stayed would keep one such tensor per layer alive
        with torch.enable_grad():
            loss = self.stage.layer_loss(
                attn, x, kwargs["position_embeddings"], kwargs["linearize_batch"], teacher, self.keep
            )
            (loss * (self.weight * self.stage.config.loss_scale)).backward()
        self.metrics[f"layer_{attn.layer_idx}"] = loss.detach() * self.stage.config.loss_scale
