"""Alignment of hidden states: what whole decoder layers, or the model's body, return is pulled to what the source's do.

`block` gives each layer that trains the source's input and compares its output, one layer's graph alive at a time:
MOHAWK's second stage (Bick et al. 2024, arXiv:2408.10189, section 3.2). `stream` compares every layer's output in the
student's own stream of hidden states (as TinyBERT does, arXiv:1909.10351, equation 8), `final` the last one alone. What
attention returns inside a layer is the business of attention_transfer.
"""

from __future__ import annotations

import fnmatch
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from linearize.data import model_inputs
from linearize.errors import UserError
from linearize.losses import cosine, l2, mse
from linearize.stages.tuning.lora import target_modules
from linearize.stages.tuning.tuned import Tuned, TunedConfig
from linearize.swap import source_weights, student_path
from linearize.teacher import blocks, run_blocks
from linearize.training.loop import Batch, Metrics
from linearize.training.precision import backpropagate

LOSSES = {"mse": mse, "l2": l2, "cosine": cosine}


class HiddenAlignConfig(TunedConfig):
    """Settings of the hidden_align stage."""

    type: Literal["hidden_align"] = "hidden_align"
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    where: Literal["block", "stream", "final"] = Field(
        "block", description="Layers on the source's inputs; layers in the student's own stream; or its end alone."
    )
    loss: Literal["mse", "l2", "cosine"] = Field(
        "l2", description="l2 is the length of the error over the root of the model's width."
    )
    train: list[str] = Field(
        ["mixer"],
        description="Parameters to train in full, by group as in finetune or by shell-style pattern; what the compared "
        "states do not depend on, such as the head, is left out.",
    )

    @model_validator(mode="after")
    def _nothing_to_recompute(self) -> HiddenAlignConfig:
        if self.where == "block" and self.gradient_checkpointing:
            raise ValueError(
                "hidden_align with where: block never holds more than one layer's activations, so "
                "gradient_checkpointing would save nothing; leave it out"
            )
        return self


class HiddenAlign(Tuned):
    """See the module docstring."""

    Config = HiddenAlignConfig
    needs_teacher = True
    config: HiddenAlignConfig

    @property
    def end_to_end(self) -> bool:  # type: ignore[override]
        """Whether the loss is the whole model's."""
        return self.config.where != "block"

    def check(self, model: Any) -> None:
        super().check(model)
        if self.config.lora is not None:
            for name in target_modules(model, self.config.lora.targets, self.family):
                if not name.startswith(self._places(model)):
                    raise UserError(
                        f"stage hidden_align with where: {self.config.where} does not depend on lora target {name!r}; "
                        "leave it out"
                    )

    def chosen(self, model: Any) -> dict[str, nn.Parameter]:
        places = self._places(model)
        inside = {name: p for name, p in super().chosen(model).items() if name.startswith(places)}
        for pattern in self.config.train:
            if not fnmatch.filter(inside, pattern):
                raise UserError(
                    f"stage hidden_align with where: {self.config.where} depends on parameters under {places[0]}* "
                    f"alone, and pattern {pattern!r} matches nothing there; train the rest in a later stage"
                )
        return inside

    def _places(self, model: Any) -> tuple[str, ...]:
        """What the names of parameters begin with that the compared states may depend on."""
        body = f"{self.family.base}." if self.family.base else ""
        return (body + self.family.attention.partition("{}")[0],) if self.config.where == "block" else (body,)

    def count(self, batch: Batch) -> int:
        mask = batch.get("attention_mask")
        return batch["input_ids"].numel() if mask is None else int(mask.sum())

    def backward(self, model: Any, batch: Batch, weight: float) -> Metrics:
        inputs = model_inputs(batch)
        mask = batch.get("attention_mask")
        keep = None if mask is None else mask.bool()
        loss = LOSSES[self.config.loss]
        if self.config.where == "block":
            return self._blockwise(model, inputs, keep, weight)
        with self.teacher(model):
            expected = self._states(model, inputs)
        found = self._states(model, inputs)
        parts = [loss(a, b, keep) for a, b in zip(found, expected, strict=True)]
        total = torch.stack(parts).mean()
        backpropagate(total * weight)
        return {"loss": total.detach()}

    def _states(self, model: Any, inputs: Batch) -> list[torch.Tensor]:
        """What is compared, [B, T, C] each."""
        if self.config.where == "final":
            return [self.family.base_model(model)(**inputs, use_cache=False).last_hidden_state]
        found: list[torch.Tensor] = []
        hooks = [
            block.register_forward_hook(lambda m, a, output: found.append(_first(output)))
            for block in blocks(model, self.family)
        ]
        try:
            self.family.base_model(model)(**inputs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _blockwise(self, model: Any, inputs: Batch, keep: torch.Tensor | None, weight: float) -> Metrics:
        metrics: Metrics = {}
        loss = LOSSES[self.config.loss]

        def see(index: int, block: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if not any(p.requires_grad for p in block.parameters()):
                return
            with torch.enable_grad(), student_path(block, source_weights(model)):
                block.train(self.dropout)  # as the model was before it became the teacher
                found = _first(block.forward(*args, **kwargs))
                block.eval()
                part = loss(found, _first(output), keep)
                backpropagate(part * weight)
            metrics[f"layer_{index}"] = part.detach()

        with self.teacher(model):
            run_blocks(model, self.family, inputs, see)
        metrics["loss"] = torch.stack(list(metrics.values())).mean()
        return metrics


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
