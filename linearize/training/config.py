"""The settings that every stage has, and those of stages that train; a stage's own settings extend them."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from linearize.schema import WITHOUT_EFFECT, Count, Seed, Strict

Beta = Annotated[float, Field(ge=0, lt=1)]


class StageConfig(Strict):
    """What every stage has, whether it trains or not."""

    type: str = Field(description="Which stage: the name of a file in linearize/stages, or module:Class.")


class TrainingConfig(StageConfig):
    """Settings of the training loop. Sizes are counted over all processes."""

    tokens: Count = Field(gt=0, description="Training tokens of this stage, for example 20M.")
    batch_size: int = Field(8, gt=0, description="Sequences per optimiser step.")
    micro_batch_size: int | None = Field(
        None,
        gt=0,
        json_schema_extra=WITHOUT_EFFECT,
        description="Sequences per forward pass and device; the rest is accumulated. Default: batch_size, divided "
        "among the processes.",
    )
    seq_len: Annotated[Count, Field(gt=1)] | None = Field(
        None, description="Tokens per sequence. Default: data.seq_len."
    )
    data: dict[str, Any] = Field(
        {}, description="What this stage trains on: keys of `data` that differ from the recipe's; all others are its."
    )
    lr: float = Field(gt=0, description="Peak learning rate.")
    lrs: dict[str, float] = Field(
        {},
        description="Other peak learning rates, by group or shell-style pattern of parameters as in `train`, such as "
        "{mixer: 1e-3}; the last that matches counts.",
    )
    schedule: Literal["cosine", "linear", "constant", "plateau"] = Field(
        "cosine",
        description="Decay after warm-up; plateau multiplies by 0.1 when the training loss stops falling, as torch's "
        "`ReduceLROnPlateau` does: when for more than `plateau_patience` windows in a row its mean over "
        "`plateau_window` steps has not been 0.01% below the least before.",
    )
    warmup: float = Field(0.02, ge=0, lt=1, description="Share of the steps in which lr rises linearly from 0.")
    min_lr_ratio: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share r of lr below which a plateau does not take it, and at which other decays end, one step "
        "after the last, as in transformers and torch. Of n steps, w of them warm-up, step s (from 0) has lr times "
        "r + (1 - r) f; f is (1 + cos(pi d)) / 2 (cosine) or 1 - d (linear), d is (s - w) / (n - w).",
    )
    plateau_window: Count = Field(
        100, gt=0, description="Optimiser steps whose mean loss the plateau schedule compares with those before."
    )
    plateau_patience: int = Field(
        10, ge=0, description="Windows in a row without a new least mean that the plateau schedule lets pass."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW moment decays.")
    clip: float | None = Field(1.0, gt=0, description="Largest norm of the whole gradient; null clips nothing.")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay per step of a moving average of the trained weights, which is then the stage's result.",
    )
    unfreeze: dict[str, float] = Field(
        {},
        description="Share of the steps after which parameters begin to train, by group or shell-style pattern as in "
        "`train`; the last that matches counts, all others train from the start, and some must.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Compute precision; auto is bf16 autocast on GPUs and fp32 on CPUs. Weights train in fp32; with "
        "fp32 those that do not are held in it too while the stage lasts, 2 bytes more for each half-precision one.",
    )
    gradient_checkpointing: bool = Field(
        False, json_schema_extra=WITHOUT_EFFECT, description="Recompute activations in the backward pass."
    )
    checkpoint_every: int = Field(
        100, gt=0, json_schema_extra=WITHOUT_EFFECT, description="Optimiser steps between resumable checkpoints."
    )
    log_every: int = Field(
        1, gt=0, json_schema_extra=WITHOUT_EFFECT, description="Optimiser steps between lines in metrics.jsonl."
    )
    seed: Seed = Field(0, description="Seed of the data order and of dropout.")

    @field_validator("train", mode="before", check_fields=False)
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("lrs")
    @classmethod
    def _rates_are_positive(cls, value: dict[str, float]) -> dict[str, float]:
        if wrong := [f"{pattern}: {lr}" for pattern, lr in value.items() if lr <= 0]:
            raise ValueError(f"rates must be greater than 0, got {wrong[0]}; leave what is not to change out of train")
        return value

    @field_validator("unfreeze")
    @classmethod
    def _shares_are_below_one(cls, value: dict[str, float]) -> dict[str, float]:
        if wrong := [f"{pattern}: {share}" for pattern, share in value.items() if not 0 <= share < 1]:
            raise ValueError(
                f"shares must lie from 0 to less than 1, got {wrong[0]}; what never trains is no part of train"
            )
        return value

    @model_validator(mode="after")
    def _micro_divides(self) -> TrainingConfig:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self

    def steps(self, seq_len: int) -> int:
        """Optimiser steps of `batch_size` sequences (or pairs) of `seq_len` tokens that reach `tokens`."""
        return math.ceil(self.tokens / (self.batch_size * seq_len))

    def trained_tokens(self, seq_len: int) -> int:
        """Tokens of those steps: `tokens`, rounded up to whole steps."""
        return self.steps(seq_len) * self.batch_size * seq_len
