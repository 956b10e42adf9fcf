"""End-to-end training of chosen tensors, of adapters, or of both: what fine-tuning and distillation have in common.

Predictions are compared row by row of the final hidden states: a few thousand rows at a time go through the language
model's head, so that logits of the whole vocabulary never exist for more than one such piece. `descend` takes each
forward and backward at once; `scored`, whose sum may be made into a loss of another form, forward, and again in the
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from pydantic import Field, field_validator
from torch import nn
from torch.utils.checkpoint import checkpoint

from linearize.data import model_inputs, predicted
from linearize.errors import UserError
from linearize.fake_run import idle_without
from linearize.mixers.base import branches_of
from linearize.schema import WITHOUT_EFFECT
from linearize.stages.base import Stage
from linearize.stages.tuning.lora import LoraSettings, attach, target_modules
from linearize.swap import swapped, teacher_path
from linearize.training.config import TrainingConfig
from linearize.training.loop import Batch
from linearize.training.names import select
from linearize.training.precision import backpropagate


class TunedConfig(TrainingConfig):
    """Settings of every stage that trains end to end."""

    lr: float = Field(1e-4, gt=0, description="Peak learning rate.")
    lora: LoraSettings | None = Field(None, description="Adapter to train; null trains only `train`.")
    train: list[str] = Field(
        [],
        description="Parameters to train in full, by group (all, mixer, attention, projections, q, k, v, o) or "
        "shell-style pattern of names, such as '*.mlp.*'.",
    )
    window_dropout: list[float] = Field(
        [],
        description="Chance that a layer's softmax window is off in a step, one after the other for equal shares of "
        "the steps, such as [0.9, 0.75, 0.5] (HedgeCATs, arXiv:2510.05901).",
    )
    head_chunk: int = Field(
        2048,
        gt=0,
        le=2**31,
        json_schema_extra=WITHOUT_EFFECT,
        description="Predictions whose logits over the whole vocabulary are in memory at once; changes memory and "
        "speed, not results.",
    )

    @field_validator("window_dropout")
    @classmethod
    def _chances(cls, value: list[float]) -> list[float]:
        if wrong := [chance for chance in value if not 0 <= chance <= 1]:
            raise ValueError(f"chances must lie between 0 and 1, got {wrong[0]}")
        return value


class Tuned(Stage):
    """Trains `train` and `lora`; a subclass says by which loss, in `backward`."""

    config: TunedConfig

    def __init__(self, config: TunedConfig, family: Any):
        super().__init__(config, family)
        self.adapter: PeftModel | None = None
        self.changed: list[str] = []

    def check(self, model: Any) -> None:
        kind = self.config.type
        if not self.family.causal:
            raise UserError(
                f"stage {kind} is for models that predict the next token, and {self.family.__name__} models see it "
                "already; remove the stage, and train the mixers by attention_transfer"
            )
        if self.config.lora is None and not self.config.train:
            raise UserError(f"stage {kind} trains nothing; set lora: {{r: 8}}, or train: [all] for all parameters")
        super().check(model)
        if self.config.window_dropout and "window" not in branches_of(model):
            raise UserError(f"stage {kind}: window_dropout finds no window; leave it out, or set mixer.window")
        if self.config.window_dropout:
            self._check_something_learns(model)

    def names(self, model: Any) -> list[str]:
        names, lora = list(self.chosen(model)), self.config.lora
        if lora is not None:
            targets = target_modules(model, lora.targets, self.family)
            parts = ["A", "B", *(["magnitude_vector"] if lora.dora else [])]
            names += [f"{target}.lora_{part}.default.weight" for target in targets for part in parts]
        return names

    def _check_something_learns(self, model: Any) -> None:
        """Raise a UserError where a step in which all windows are off would have no gradient."""
        names, count = self.names(model), len(self.config.window_dropout)
        moments = {number / count for number in range(count)} | {self.starts(name) for name in names}
        for done in sorted(moments):
            training = {name for name in names if self.starts(name) <= done}
            chance = self._window_chance(done)
            if chance and all(".mixer." in name for name in training) and training <= _window_parameters(model):
                raise UserError(
                    f"stage {self.config.type}: window_dropout {chance:g} can switch all windows off, and what trains "
                    f"after {done:g} of the steps gets no gradient then ({', '.join(sorted(training)[:3])}); train "
                    "more, such as train: [mixer], or leave window_dropout out"
                )

    def _window_chance(self, done: float) -> float:
        chances = self.config.window_dropout
        return chances[int(done * len(chances) + 1e-9)]  # a third of three is one, whatever floats say

    def chosen(self, model: Any) -> dict[str, nn.Parameter]:
        """The parameters that `train` names, by full name."""
        return select(model, self.config.train, self.config.type)

    def prepare(self, model: Any) -> dict[str, nn.Parameter]:
        self.check(model)
        config = self.config
        chosen = self.chosen(model)
        self.changed = list(chosen)
        if config.lora is None:
            return chosen
        targets = target_modules(model, config.lora.targets, self.family)
        self.changed += [f"{name}.weight" for name in targets]
        self.adapter = attach(model, config.lora, targets, config.seed)
        full = {id(p) for p in chosen.values()}
        return {name: p for name, p in model.named_parameters() if id(p) in full or ".lora_" in name}

    def at(self, model: Any, parameters: dict[str, nn.Parameter], done: float) -> None:
        super().at(model, parameters, done)
        if self.config.window_dropout:
            chance = self._window_chance(done)
            for attn in swapped(model).values():
                attn.mixer.disabled = frozenset({"window"} if torch.rand(()) < chance else ())

    def count(self, batch: Batch) -> int:
        return int(predicted(batch).sum())

    def finish(self, model: Any, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        for attn in swapped(model).values():
            attn.mixer.disabled = frozenset()
        if self.adapter is not None and self.config.lora and self.config.lora.merge:
            self.remember(model, [name.replace(".weight", ".base_layer.weight") for name in self.changed])
            self.adapter.merge_and_unload()
            self.adapter = None
        state = model.state_dict()
        if self.adapter is None:
            return {name: state[name] for name in dict.fromkeys(self.changed)}
        renamed = {name.replace(".base_layer.", "."): name for name in state}
        kept = [renamed[name] for name in self.changed if name in renamed]
        return {name: tensor for name, tensor in state.items() if ".lora_" in name or name in kept}

    def restore(self, model: Any, tensors: dict[str, torch.Tensor]) -> None:
        if self.config.lora is not None and not self.config.lora.merge:
            self.prepare(model)
        super().restore(model, tensors)

    @contextmanager
    def teacher(self, model: Any) -> Iterator[None]:
        """Inside the context `model` is the source model, in eval mode and without gradients."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), teacher_path(model):
                yield
        finally:
            model.train(training)

    def hidden(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The final hidden states that predict something, [N, C], and the tokens they are to predict, [N]."""
        hidden = self.family.base_model(model)(**model_inputs(batch), use_cache=False).last_hidden_state
        asked = predicted(batch)
        return hidden[:, :-1][asked], batch["labels"][:, 1:][asked]

    def scored(self, loss: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
        """The sum of `loss(*pieces)`, summed losses [K] themselves, over pieces of `head_chunk` rows.

        Args:
            loss: takes a piece of each of `rows`.
            rows: tensors [N, ...].
        """
        pieces = zip(*(t.split(self.config.head_chunk) for t in rows), strict=True)
        if not torch.is_grad_enabled():
            return sum(loss(*piece) for piece in pieces)  # type: ignore[return-value]
        return sum(checkpoint(loss, *piece, use_reentrant=False) for piece in pieces)

    def descend(
        self, loss: Callable[..., torch.Tensor], weight: float, hidden: torch.Tensor, *rows: torch.Tensor
    ) -> torch.Tensor:
        """As `scored`, with the gradient of the first loss times `weight`; each piece goes through the head once.

        Args:
            loss: takes a piece of `hidden` and of each of `rows`.
            hidden: [N, C], with the graph of the model before the head.
            rows: tensors [N, ...] that have no gradient.

        Returns:
            [K], detached.
        """
        pieces = [piece.requires_grad_(hidden.requires_grad) for piece in hidden.detach().split(self.config.head_chunk)]
        found = []
        for piece in zip(pieces, *(t.split(self.config.head_chunk) for t in rows), strict=True):
            losses = loss(*piece)
            backpropagate(losses[0] * weight)
            found.append(losses.detach())
        if hidden.requires_grad:
            backpropagate(hidden, torch.cat([piece.grad for piece in pieces]))
        return torch.stack(found).sum(0)


def _window_parameters(model: nn.Module) -> set[str]:
    """Full names of the parameters of mixers that only a window reaches."""
    mixers = {name: attn.mixer for name, attn in swapped(model).items() if "window" in attn.mixer.branches}
    return {f"{name}.mixer.{key}" for name, mixer in mixers.items() for key in idle_without(mixer, "window")}
