"""LoRA and DoRA on the projections of a language model, made by peft."""

from __future__ import annotations

import warnings
from collections import Counter

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from torch import nn
from transformers.pytorch_utils import Conv1D

from linearize.errors import UserError, did_you_mean
from linearize.families.base import Family
from linearize.schema import Strict


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


def attach(model: nn.Module, settings: LoraSettings, targets: list[str], seed: int) -> PeftModel:
    """Put an adapter on the modules of these full names, in place; its first values depend on `seed`."""
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft takes any number
        lora_dropout=settings.dropout,
        use_dora=settings.dora,
        target_modules=_shortest(targets, model),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # peft asks for a property that transformers is renaming
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return get_peft_model(model, config)


def target_modules(model: nn.Module, targets: list[str], family: type[Family]) -> list[str]:
    """Full names of the modules that get an adapter: in the language model alone, where there is more.

    Raises:
        UserError: for a target that names no linear module, and for one whose weight the embeddings share.
    """
    short = family.lora_targets
    inside = f"{family.base}." if family.base else ""
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
