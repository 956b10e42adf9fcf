"""The stage contract: change some named tensors of a swapped model and leave every other tensor bit-identical.

`Stage.run` is the whole life of a stage: choose and prepare the trained tensors, train them in float32 on the shared
loop, and write what changed to `result.safetensors`, from which a resumed conversion restores instead of training. A
stage that does not train derives from `Edit` and says what it changes in `edit`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from linearize.data import DataConfig, PackedDataset, Rows
from linearize.errors import UserError, disk_full
from linearize.families.base import Family
from linearize.swap import source_weights
from linearize.training.checkpoint import read_tensors, remove_checkpoints, write_tensors
from linearize.training.loop import Batch, Metrics, train
from linearize.training.names import check_patterns, last_match, spelled_out, starts
from linearize.training.precision import float32_weights, precision
from linearize.training.processes import is_main

RESULT = "result.safetensors"
"""File of a finished stage's result in its folder."""


class Stage:
    """Base class of all stages. A subclass lives in a file named after its recipe key.

    Args:
        config: an instance of the subclass's `Config`; the stage's own copy has patterns for names of groups.
        family: the model's architecture.
    """

    Config: ClassVar[type[Any]]
    """Its settings: a `TrainingConfig`, or of an `Edit` a `StageConfig`."""
    trains: ClassVar[bool] = True
    """Whether it takes optimiser steps on data."""
    item_rows: ClassVar[int] = 1
    """Rows of data that belong together: 2 where it trains on pairs of replies."""
    dropout: ClassVar[bool] = True
    """Whether the model is in training mode while the stage runs, with the dropout that its config asks for."""
    end_to_end: ClassVar[bool] = True
    """Whether the loss is the whole model's, so that the same step can be taken by the softmax teacher."""
    needs_teacher: ClassVar[bool] = False
    """Whether it looks at the source model, which therefore must not be lost to training."""
    adapter: Any = None
    """The peft model of an adapter that was not merged, after the stage has run; exported beside the weights."""

    def __init__(self, config: Any, family: type[Family]):
        self.config = spelled_out(config, family)
        self.family = family
        self.keep_source = self.keeps_source
        """Whether tensors that this stage changes are kept, so that `teacher_path` stays the source model."""

    @property
    def keeps_source(self) -> bool:
        """Whether it looks at the source model while it trains, for which what it changes itself is kept too."""
        return self.needs_teacher

    def check(self, model: Any) -> None:
        """Raise the errors that a run would begin with, and change nothing; `model` may lie on the meta device."""
        if self.trains:
            check_patterns(self.config, self.names(model))

    def names(self, model: Any) -> list[str]:
        """Full names of what trains; by default `prepare` is tried on a copy of the model."""
        return list(self.prepare(copy.deepcopy(model)))

    def check_data(self, own: DataConfig, recipe: DataConfig) -> None:
        """Raise errors that the data cause: the stage's `own`, and the recipe's, from which they may differ."""
        if own.item_rows != self.item_rows:
            needs, remedy = "texts", "text"
            if self.item_rows > 1:
                needs, remedy = "pairs of replies", "preference"
            raise UserError(
                f"stage {self.config.type} trains on {needs}, and its data.format is {own.format}; give the stage data "
                f"of its own, data: {{source: ..., format: {remedy}}}"
            )

    def prepare(self, model: Any) -> dict[str, nn.Parameter]:
        """Ready the model for this stage (hooks, adapters) and return the parameters to train, by full name; `names`
        calls it on a model that may lie on the meta device.
        """
        raise NotImplementedError

    def rows(self, model: Any, data: PackedDataset, folder: Path, resume: bool) -> Rows:
        """What is trained on; a subclass may add to batches, from files that `tidy` removes. `model` is as it came."""
        return data

    def completed(self, model: Any, batch: Batch) -> Batch:
        """A batch of rows that are on no disk, with what `rows` would have added."""
        return batch

    def tidy(self, folder: Path) -> None:
        """Remove what only an unfinished stage needs, once its result is on disk."""
        remove_checkpoints(folder)

    def backward(self, model: Any, batch: Batch, weight: float) -> Metrics:
        """Forward and backward of one micro-batch; gradients are those of `weight` times the summed loss.

        Returns:
            Sums over the micro-batch, "loss" among them, as scalar tensors.
        """
        raise NotImplementedError

    def count(self, batch: Batch) -> int:
        """How many items the summed loss of a micro-batch has; by default its real tokens."""
        mask = batch.get("attention_mask")
        return batch["input_ids"].numel() if mask is None else int(mask.sum())

    def finish(self, model: Any, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Undo `prepare` and return what changed: full name in the model -> tensor; by default what was trained."""
        return dict(parameters)

    def restore(self, model: Any, tensors: dict[str, torch.Tensor]) -> None:
        """Put what an earlier `finish` returned into a model that has not run this stage."""
        self.remember(model, tensors)
        state = model.state_dict()
        for name, tensor in tensors.items():
            state[name].copy_(tensor)

    def remember(self, model: Any, names: Iterable[str]) -> None:
        """Where the source model is still needed, keep its values of these parameters, which are about to change."""
        if self.keep_source:
            own, wanted = dict(model.named_parameters()), set(names)
            source_weights(model).keep(p for n, p in own.items() if n in wanted and _is_of_source(n))

    def lr_scale(self, name: str) -> float:
        """Factor on the learning rate for the parameter `name`: the last pattern of `lrs` that matches it decides."""
        return last_match(self.config.lrs, name, self.config.lr) / self.config.lr

    def starts(self, name: str) -> float:
        """Share of the steps after which the parameter `name` begins to train, by `unfreeze`."""
        return starts(self.config, name)

    def at(self, model: Any, parameters: dict[str, nn.Parameter], done: float) -> None:
        """Ready the next step, when the share `done` of all steps was taken: freeze what is not to train yet."""
        if not self.config.unfreeze:
            return
        for name, p in parameters.items():
            p.requires_grad_(done >= self.starts(name))

    def begin(self, model: Any) -> tuple[dict[str, torch.dtype], dict[str, nn.Parameter]]:
        """Freeze the model but for what this stage trains, which is put into float32.

        Returns:
            The dtypes that the trained parameters had, and the parameters, both by full name.
        """
        for p in model.parameters():
            p.requires_grad_(False)
        parameters = self.prepare(model)
        check_patterns(self.config, parameters)
        self.remember(model, parameters)
        dtypes = {name: p.dtype for name, p in parameters.items()}
        for p in parameters.values():
            p.data = p.data.float()
            p.requires_grad_(True)
        model.train(self.dropout)
        return dtypes, parameters

    def precise(self, model: Any) -> AbstractContextManager:
        """The context in which weights have the types that the stage computes in; trained ones are float32 anyway."""
        fp32 = precision(self.config, next(model.parameters()).device) == "fp32"
        return float32_weights(model) if fp32 else nullcontext()

    @staticmethod
    def finished(folder: Path) -> bool:
        """Whether a stage's folder has its result."""
        return (folder / RESULT).exists()

    def run(
        self, model: Any, data: PackedDataset | None, folder: Path, resume: bool = False, keep_source: bool = False
    ) -> float:
        """Run the stage, or restore its result when `resume` finds it finished.

        Args:
            model: a swapped model; changed in place.
            data: packed sequences; None for a stage that does not train.
            folder: the stage's own folder, for metrics, checkpoints and the result.
            resume: continue from what an earlier, interrupted run left in `folder`.
            keep_source: whether a later stage needs the source model.

        Returns:
            Seconds of training, those of interrupted and finished runs included.
        """
        self.keep_source = self.keeps_source or keep_source
        result = folder / RESULT
        if resume and self.finished(folder):
            tensors, state = read_tensors(result)
            with torch.no_grad():
                self.restore(model, tensors)
            self.tidy(folder)
            return state["seconds"]
        seconds, changed = self.work(model, data, folder, resume)
        if is_main():
            write_tensors(result, changed, {**facts_of(data), "type": self.config.type, "seconds": seconds})
            self.tidy(folder)
        return seconds

    def work(
        self, model: Any, data: PackedDataset | None, folder: Path, resume: bool
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """What `run` does where there is no result yet; returns seconds of training, and what `finish` does."""
        assert data is not None, f"stage {self.config.type} trains, and was given no data"
        with self.precise(model):
            seconds, parameters = self._train(model, data, folder, resume)
        with torch.no_grad():
            return seconds, self.finish(model, parameters)

    def _train(
        self, model: Any, data: PackedDataset, folder: Path, resume: bool
    ) -> tuple[float, dict[str, nn.Parameter]]:
        """Seconds that it took, and the trained parameters, which have their own types again."""
        rows = self.rows(model, data, folder, resume)
        dtypes, parameters = self.begin(model)
        if self.config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with disk_full(folder):  # TensorBoard's writer raises from any of its calls
            seconds = train(
                self.config,
                parameters,
                rows,
                folder,
                backward=lambda batch, weight: self.backward(model, batch, weight),
                count=self.count,
                lr_scale=self.lr_scale,
                at=lambda done: self.at(model, parameters, done),
                resume=resume,
                facts=facts_of(data),
            )
        if self.config.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.eval()
        for name, p in parameters.items():
            p.data = p.data.to(dtypes[name])
            p.requires_grad_(False)
        return seconds, parameters


def facts_of(data: PackedDataset | None) -> dict[str, Any]:
    """What tells the rows that were trained on from others."""
    return {} if data is None else {"data": data.content, "max_tokens": data.info["config"]["max_tokens"]}


class Edit(Stage):
    """Base class of stages that change a model without training. `Config` is a `StageConfig`."""

    trains = False
    end_to_end = False

    def edit(self, model: Any) -> dict[str, torch.Tensor]:
        """Change the model in place, after `remember`; returns what changed, as `finish` does."""
        raise NotImplementedError

    def work(
        self, model: Any, data: PackedDataset | None, folder: Path, resume: bool
    ) -> tuple[float, dict[str, torch.Tensor]]:
        with torch.no_grad():
            return 0.0, self.edit(model)


def _is_of_source(name: str) -> bool:
    return ".mixer." not in name and ".lora_" not in name
