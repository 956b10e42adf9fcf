"""Distillation of predictions: pull the student's distribution over the next token towards the source model's.

    L = (1 - ce) tau^2 KL(p_teacher^(1/tau) || p_student^(1/tau)) + ce CE

summed over all positions that predict something and divided by their number: Hinton et al. 2015 (arXiv:1503.02531).
`ce_on: answers` takes that only where an answer of a recall document is predicted, and KL alone everywhere else: of
facts that the teacher has missed the student learns the right one, of text what the teacher makes of it.
`divergence: reverse` is MiniLLM's direction (Gu et al. 2023, arXiv:2306.08543), `jensen_shannon` the mean of the two
against their mixture (GKD, Agarwal et al. 2023, arXiv:2306.13649). The teacher is the source model inside the converted
one: only tensors that training changes are held twice.

`teacher_temperature` corrects a teacher that is too sure of itself on text that it has not seen: p_teacher is then
that of its logits over this number (temperature scaling, Guo et al. 2017, arXiv:1706.04599). Its first choices stay
what they are. At the T where the teacher's own loss on such text is lowest the student is as sure of them as they
deserve; at its root, which is the one to begin with, it has most of the gain in loss and stays nearer to the teacher.

`teacher: cached` writes its `top_k` likeliest tokens to disk before training, at the stage's temperatures, once for
each row that is visited (`linearize.stages.tuning.cached`), so that steps take no teacher and nothing is held for one.
The files, 8 top_k + 4 bytes per predicted token, lie in the stage's folder until its result does.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from linearize.data import DataConfig, PackedDataset, Rows, predicted, visited
from linearize.errors import UserError
from linearize.losses import coarse_divergence, divergence, likeliest, next_token
from linearize.stages.tuning.cached import LOG_PROBS, TOKENS, WithPredictions, write_predictions
from linearize.stages.tuning.tuned import Tuned, TunedConfig
from linearize.training.loop import Batch, Metrics
from linearize.training.precision import autocast
from linearize.training.processes import is_main, join, wait_for_all

Compare = Callable[[Any], torch.Tensor]
CACHE = "teacher"
"""Folder of the predictions in that of the stage."""


class LogitKLConfig(TunedConfig):
    """Settings of the logit_kl stage."""

    type: Literal["logit_kl"] = "logit_kl"
    temperature: float = Field(1.0, ge=0.01, le=100, description="tau: both distributions' logits are divided by it.")
    teacher_temperature: float = Field(
        1.0,
        ge=0.01,
        le=100,
        description="Divides the teacher's logits alone, before temperature. Above 1 the student learns to be less "
        "sure of itself than the teacher is. Probe calibration measures at which one the teacher predicts a text best; "
        "take the root of that.",
    )
    divergence: Literal["forward", "reverse", "jensen_shannon"] = Field(
        "forward", description="forward: KL(teacher || student)."
    )
    top_k: int | None = Field(
        None,
        gt=0,
        description="Compare the teacher's k likeliest tokens and all others as one; null for the whole vocabulary.",
    )
    teacher: Literal["live", "cached"] = Field(
        "live",
        description="live runs the teacher beside the student in every step; cached writes its top_k predictions to "
        "disk before the first.",
    )
    ce: float = Field(0.0, ge=0, lt=1, description="Weight of the next-token cross-entropy; KL has the rest.")
    ce_on: Literal["all", "answers"] = Field(
        "all",
        description="Where ce counts: in all predictions, or in those of answers in synthetic recall documents "
        "(data.recall_fraction), with KL alone elsewhere.",
    )

    @model_validator(mode="after")
    def _something_counts(self) -> LogitKLConfig:
        if self.ce_on == "answers" and not self.ce:
            raise ValueError("ce_on: answers says where the cross-entropy counts, and ce is 0; set ce, such as 0.9")
        return self


class LogitKL(Tuned):
    """See the module docstring."""

    Config = LogitKLConfig
    needs_teacher = True
    config: LogitKLConfig

    @property
    def keeps_source(self) -> bool:
        return self.config.teacher == "live"

    @property
    def of_teacher(self) -> float:
        """By what the teacher's logits are divided."""
        return self.config.temperature * self.config.teacher_temperature

    def check(self, model: Any) -> None:
        super().check(model)
        config, vocabulary = self.config, model.config.get_text_config().vocab_size
        if config.top_k is not None and config.top_k > vocabulary:
            raise UserError(
                f"stage logit_kl: top_k {config.top_k:,} is more than the vocabulary of {vocabulary:,}; take fewer, or "
                "null for all"
            )
        if config.teacher == "cached" and (config.top_k is None or config.top_k >= vocabulary):
            raise UserError(
                f"stage logit_kl: teacher: cached with top_k {'null' if config.top_k is None else config.top_k} would "
                f"write all {vocabulary:,} log-probabilities of a prediction, 4 bytes each: "
                f"{_size(4 * vocabulary * config.tokens)} for {config.tokens:,} tokens; set top_k to fewer, such as "
                f"64 ({_size((8 * 64 + 4) * config.tokens)}), or teacher: live"
            )

    def check_data(self, own: DataConfig, recipe: DataConfig) -> None:
        super().check_data(own, recipe)
        if self.config.ce_on == "answers" and not own.recall_fraction:
            raise UserError(
                "stage logit_kl: ce_on: answers finds no recall documents, because its data.recall_fraction is 0; give "
                "the stage data: {recall_fraction: 0.5}, or set ce_on: all"
            )

    def rows(self, model: Any, data: PackedDataset, folder: Path, resume: bool) -> Rows:
        config, place = self.config, folder / CACHE
        if config.teacher == "live":
            return data
        self.check(model)
        join(model.device)
        if is_main() and not resume:
            shutil.rmtree(place, ignore_errors=True)
        wait_for_all()
        rows = visited(data, config.steps(data.seq_len) * config.batch_size, config.seed)
        facts = {"data": data.folder.name, "top_k": config.top_k, "temperature": self.of_teacher}
        size = config.micro_batch_size or config.batch_size
        write_predictions(place, data, rows, facts, size, lambda batch: self.predictions(model, batch))
        wait_for_all()
        return WithPredictions(place, data, rows, facts)

    def completed(self, model: Any, batch: Batch) -> Batch:
        if self.config.teacher == "live":
            return batch
        return {**batch, **dict(zip((LOG_PROBS, TOKENS), self.predictions(model, batch), strict=True))}

    def tidy(self, folder: Path) -> None:
        super().tidy(folder)
        shutil.rmtree(folder / CACHE, ignore_errors=True)

    def predictions(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """What the teacher says about the predicted tokens of a batch, as `linearize.losses.likeliest` puts it."""
        config, device = self.config, model.device
        assert config.top_k is not None
        with self.teacher(model), autocast(config, device):
            hidden, _ = self.hidden(model, {k: v.to(device) for k, v in batch.items()})
            pieces = [
                likeliest(self.family.logits(model, piece), config.top_k, self.of_teacher)
                for piece in hidden.split(config.head_chunk)
            ]
        log_probs, tokens = zip(*pieces, strict=True)
        return torch.cat(log_probs), torch.cat(tokens)

    def backward(self, model: Any, batch: Batch, weight: float) -> Metrics:
        descend = self._cached if self.config.teacher == "cached" else self._live
        return dict(zip(("loss", "kl", "ce"), descend(model, dict(batch), weight), strict=True))

    def _cached(self, model: Any, batch: Batch, weight: float) -> torch.Tensor:
        config, log_probs, tokens = self.config, batch.pop(LOG_PROBS), batch.pop(TOKENS)
        hidden, targets = self.hidden(model, batch)

        def loss(hidden: torch.Tensor, log_t: torch.Tensor, tokens: torch.Tensor, *predicted: torch.Tensor) -> Any:
            student = self.family.logits(model, hidden)
            settings = (config.divergence, config.temperature)
            return self._mixed(
                lambda rows: coarse_divergence(student[rows], log_t[rows], tokens[rows].long(), *settings),
                student,
                *predicted,
            )

        return self.descend(loss, weight, hidden, log_probs, tokens, targets, _of_answers(batch))

    def _live(self, model: Any, batch: Batch, weight: float) -> torch.Tensor:
        config = self.config
        with self.teacher(model):
            expected, _ = self.hidden(model, batch)
        hidden, targets = self.hidden(model, batch)

        def loss(hidden: torch.Tensor, expected: torch.Tensor, *predicted: torch.Tensor) -> torch.Tensor:
            student = self.family.logits(model, hidden)
            with self.teacher(model):
                teacher = self.family.logits(model, expected)
            settings = (config.divergence, config.temperature, config.top_k, config.teacher_temperature)
            return self._mixed(lambda rows: divergence(student[rows], teacher[rows], *settings), student, *predicted)

        return self.descend(loss, weight, hidden, expected, targets, _of_answers(batch))

    def _mixed(
        self, compare: Compare, student: torch.Tensor, targets: torch.Tensor, answers: torch.Tensor
    ) -> torch.Tensor:
        """Loss, divergence and cross-entropy, the last where `ce_on` says, each summed over predictions: [3].

        Args:
            compare: the divergence of the predictions that an index chooses, summed.
            student: logits [N, vocabulary].
            targets: [N] token ids.
            answers: [N] bool, which of them are of answers.
        """
        config, everywhere = self.config, slice(None)
        kl = compare(everywhere)
        if config.ce_on == "all":
            ce = next_token(student, targets)
            loss = (1 - config.ce) * kl + config.ce * ce
        else:
            ce = next_token(student[answers], targets[answers])
            loss = kl + config.ce * (ce - compare(answers))
        return torch.stack([loss, kl, ce])


def _of_answers(batch: Batch) -> torch.Tensor:
    """Which of the predicted tokens of a batch are of answers in recall documents, [N] bool."""
    asked = predicted(batch)
    answers = batch.get("answers")
    return torch.zeros_like(asked[asked]) if answers is None else answers[:, 1:][asked]


def _size(count: float) -> str:
    """Bytes in words: 1.5e9 -> 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
