"""Fine-tuning: next-token cross-entropy on the converted model, through LoRA adapters, in full, or on chosen tensors.

Source of the default (LoRA rank 8 on q, k, v, o at 1e-4): LoLCATs (arXiv:2410.10254), section 3.2.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from torch import nn
from transformers.pytorch_utils import Conv1D

from linearize.errors import UserError, did_you_mean
from linearize.losses import next_token
from linearize.schema import Strict
from linearize.stages.base import Stage, select
from linearize.training.config import TrainingConfig
from linearize.training.loop import Batch, Metrics


class LoraSettings(Strict):
    """A LoRA adapter (Hu et al. 2021, arXiv:2106.09685), made by peft."""

    r: int = Field(8, gt=0, description="Rank.")
    alpha: float = Field(16, gt=0, description="Scale; the update is alpha / r times the product of the factors.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: list[str] = Field(
        ["q", "k", "v", "o"],
        min_length=1,
        description="Projections q, k, v, o of the family, or module names.",
    )
    dora: bool = Field(False, description="Weight-decomposed LoRA (arXiv:2402.09353).")
    merge: bool = Field(
        True,
        description="Fold the adapter into the weights when the stage ends; false exports it beside them.",
    )


class FinetuneConfig(TrainingConfig):
    """Settings of the finetune stage."""

    type: Literal["finetune"] = "finetune"
    lr: float = Field(1e-4, gt=0, description="Peak learning rate.")
    lora: LoraSettings | None = Field(None, description="Adapter to train; null trains only `train`.")
    train: list[str] = Field(
        [],
        description="Shell-style patterns of parameters to train in full, such as '*.mixer.*' or '*' for all.",
    )
    mixer_lr: float | None = Field(None, gt=0, description="Peak learning rate of mixer parameters. Default: lr.")


class Finetune(Stage):
    """See the module docstring."""

    Config = FinetuneConfig
    config: FinetuneConfig

    def __init__(self, config: FinetuneConfig, family: Any):
        super().__init__(config, family)
        self.adapter: PeftModel | None = None
        self.changed: list[str] = []

    def check(self, model: Any) -> None:
        if not self.family.causal:
            raise UserError(
                f"stage finetune predicts the next token, and {self.family.__name__} models see it already; remove the "
                "stage, and train the mixers by attention_transfer"
            )
        if self.config.lora is None and not self.config.train:
            raise UserError("stage finetune trains nothing; set lora: {r: 8}, or train: ['*'] for all parameters")
        select(model, self.config.train, "finetune")
        if self.config.lora is not None:
            self._targets(model, self.config.lora.targets)

    def prepare(self, model: Any) -> dict[str, nn.Parameter]:
        self.check(model)
        config = self.config
        chosen = select(model, config.train, "finetune")
        self.changed = list(chosen)
        if config.lora is None:
            return chosen
        targets = self._targets(model, config.lora.targets)
        self.changed += [f"{name}.weight" for name in targets]
        settings = LoraConfig(
            r=config.lora.r,
            lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # peft takes any number
            lora_dropout=config.lora.dropout,
            use_dora=config.lora.dora,
            target_modules=_shortest(targets, model),
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(config.seed)
        with warnings.catch_warnings():  # peft asks for a property that transformers is renaming
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            self.adapter = get_peft_model(model, settings)
        full = {id(p) for p in chosen.values()}
        return {name: p for name, p in model.named_parameters() if id(p) in full or ".lora_" in name}

    def backward(self, model: Any, batch: Batch, weight: float) -> Metrics:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        loss = next_token(model(**inputs, use_cache=False).logits, batch["labels"])
        (loss * weight).backward()
        return {"loss": loss.detach()}

    def count(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != -100).sum())

    def finish(self, model: Any, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        if self.adapter is not None and self.config.lora and self.config.lora.merge:
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

    def lr_scale(self, name: str) -> float:
        if self.config.mixer_lr is not None and ".mixer." in name:
            return self.config.mixer_lr / self.config.lr
        return 1.0

    def _targets(self, model: nn.Module, targets: list[str]) -> list[str]:
        """Full names of the modules that get an adapter: in the language model alone, where there is more."""
        short = self.family.lora_targets
        inside = f"{self.family.base}." if self.family.base else ""
        linear = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and (name.startswith(inside) or "." not in name)
        }
        known = {name.rpartition(".")[2] for name in linear}
        chosen = {short.get(target, target) for target in targets}
        for name in sorted(chosen - known):
            raise UserError(f"unknown lora target {name!r}{did_you_mean(name, [*short, *known])}")
        found = [name for name in linear if name.rpartition(".")[2] in chosen]
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        for name in found:
            if any(uses[id(p)] > 1 for p in linear[name].parameters()):
                raise UserError(
                    f"lora target {name!r} shares its weight with the input embeddings, so its adapter cannot be told "
                    "apart from a change of those; leave it out, or use a model with untied embeddings"
                )
        return found


def _shortest(names: list[str], model: nn.Module) -> list[str]:
    """Last parts of module names, as peft is used to them, where they match no other module; else the names."""
    last = sorted({name.rpartition(".")[2] for name in names})
    matched = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in last]
    return last if sorted(matched) == sorted(names) else names
