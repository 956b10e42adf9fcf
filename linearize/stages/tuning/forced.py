"""Training of swapped layers on the teacher's inputs, layer by layer: what stages share that compare inside attention.

The teacher's hidden states run through the whole model; inside each swapped layer the mixer sees the teacher's input,
and the teacher's output is what goes on to the next layer. Each layer's loss is backpropagated on the spot, so only one
layer's graph is alive at a time.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import nn

from linearize.data import model_inputs
from linearize.errors import UserError
from linearize.stages.base import Stage
from linearize.swap import Call, SwappedAttention, source_weights, student_path, swapped
from linearize.teacher import run_teacher
from linearize.training.config import TrainingConfig
from linearize.training.loop import Batch, Metrics
from linearize.training.names import select
from linearize.training.precision import backpropagate


class ForcedConfig(TrainingConfig):
    """Settings of every stage that trains on the teacher's inputs."""

    train: list[str] = Field(
        ["mixer"],
        description="Parameters to train, by group (mixer, attention, projections, q, k, v, o) or shell-style pattern "
        "of names: those of mixers, and of projections of swapped layers; what other layers hold is left out.",
    )

    @model_validator(mode="after")
    def _nothing_to_recompute(self) -> ForcedConfig:
        if self.gradient_checkpointing:
            raise ValueError(
                f"{self.type} never holds more than one layer's activations, so gradient_checkpointing would "
                "save nothing; leave it out"
            )
        return self


class Forced(Stage):
    """A subclass says what is compared: `target`, of the teacher, and `layer_loss`, of the student against it."""

    end_to_end = False
    dropout = False  # the teacher's targets are to be exact
    needs_teacher = True
    config: ForcedConfig

    def target(self, attn: SwappedAttention, call: Call, heads: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What the teacher does in this layer, computed while parameters have the source's values.

        Args:
            attn: the swapped attention.
            call: what the teacher's attention was given.
            heads: its head outputs [B, T, Hq * V].
            output: what it returned, [B, T, C].
        """
        raise NotImplementedError

    def layer_loss(
        self, attn: SwappedAttention, call: Call, target: torch.Tensor, keep: torch.Tensor | None
    ) -> torch.Tensor:
        """Summed loss of one layer; `keep` [B, T] marks real tokens, None for all. The rest is as in `target`."""
        raise NotImplementedError

    def names(self, model: Any) -> list[str]:
        return list(self.prepare(model))  # which changes nothing

    def prepare(self, model: Any) -> dict[str, nn.Parameter]:
        stage = self.config.type
        if not self.config.train:
            raise UserError(f"stage {stage} trains nothing; set train: [mixer], or leave it out, which is the same")
        mixers = {type(attn.mixer).__name__: next(attn.mixer.parameters(), None) for attn in swapped(model).values()}
        if self.config.train == ["*.mixer.*"] and all(parameter is None for parameter in mixers.values()):
            raise UserError(
                f"stage {stage} has nothing to train: {', '.join(sorted(mixers))} adds no parameters; remove the stage"
            )
        places = tuple(f"{name}." for name in swapped(model))
        chosen = select(model, self.config.train, stage)
        inside = {name: p for name, p in chosen.items() if name.startswith(places)}
        for pattern in self.config.train:
            if not fnmatch.filter(inside, pattern):
                raise UserError(
                    f"stage {stage} trains swapped layers' attention only, and pattern {pattern!r} matches nothing "
                    f"there; use mixer, attention, or patterns such as '{places[0]}*', and train the rest later"
                )
        return inside

    def backward(self, model: Any, batch: Batch, weight: float) -> Metrics:
        metrics: Metrics = {}
        weights = source_weights(model)
        mask = batch.get("attention_mask")
        keep = None if mask is None else mask.bool()

        def train(name: str, attn: SwappedAttention, call: Call, heads: torch.Tensor, output: torch.Tensor) -> None:
            if not any(p.requires_grad for p in attn.parameters()):
                return
            target = self.target(attn, call, heads, output)
            with torch.enable_grad(), student_path(attn, weights):
                loss = self.layer_loss(attn, call, target, keep)
                if not loss.requires_grad:  # what trains here comes after what is compared
                    return
                backpropagate(loss * weight)
            metrics[f"layer_{attn.layer_idx}"] = loss.detach()

        with torch.no_grad():
            run_teacher(model, model_inputs(batch), train)
        if not metrics:
            raise UserError(
                f"stage {self.config.type}: what it compares depends on nothing that trains "
                f"({', '.join(self.config.train)}); train other parameters here, such as mixer, q or k, and these in a "
                "later stage"
            )
        metrics["loss"] = torch.stack(list(metrics.values())).mean()
        return metrics
