"""Measures a model in memory, as the pipeline does between stages and `evaluate` does with a checkpoint.

`measure(model, tokenizer, config, token_ids=..., seq_len=...)` gives a `Measurement`, plain data that goes to
JSON and back. Put the call inside `linearize.swap.teacher_path(model)` to measure the source model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from linearize.data import DataConfig, read_tokens, tokens_of
from linearize.errors import UserError
from linearize.evals.agreement import Agreement, agreement
from linearize.evals.config import EvalConfig
from linearize.evals.divergence import Divergence, divergence_on_text
from linearize.evals.items import Asked, Items
from linearize.evals.lm_harness import lm_eval_tasks
from linearize.evals.probes.base import Subject, probe_of
from linearize.evals.recall_score import CASES, RecallScore, generate_greedily, padding_id, recall
from linearize.evals.task_groups import main_metric
from linearize.evals.text import BranchLoss, TextLoss, branch_losses, evaluating, loss_on_text
from linearize.registry import known_family
from linearize.swap import swapped, teacher_path

TEXT_TOKENS = 2_000_000
"""Tokens of evaluation text that are read at most; windows are spread over them."""


@dataclass
class Measurement:
    """Everything measured on one model at one point."""

    losses: list[TextLoss] = field(default_factory=list)
    branches: list[BranchLoss] = field(default_factory=list)
    recall: list[RecallScore] = field(default_factory=list)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    """{task or group: {metric: value}} from the lm-evaluation-harness."""
    groups: dict[str, list[str]] = field(default_factory=dict)
    """The tasks of each group among them."""
    items: dict[str, Items] = field(default_factory=dict)
    """The answers to each question of tasks that are right or wrong, to compare models question by question."""
    asked: dict[str, Asked] = field(default_factory=dict)
    """How each task and group was asked; empty in measurements that are older than this."""
    prompt: str | None = None
    sample: str | None = None
    """What the model wrote after `prompt`, greedily."""
    divergence: list[Divergence] = field(default_factory=list)
    """From the teacher's predictions."""
    probes: list[dict[str, Any]] = field(default_factory=list)
    """`{"probe": settings, "result": plain data}` of each further measurement that was asked for and fits the model."""
    agreement: list[Agreement] = field(default_factory=list)
    """Of an encoder with its softmax teacher."""
    tokens: int = 0
    """Training tokens used up to this point."""
    seconds: float = 0.0
    """Wall-clock seconds of training up to this point."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know to read the numbers right."""

    def loss(self, length: int) -> float | None:
        """Nats per token at `length`, None if not measured."""
        return next((point.loss for point in self.losses if point.length == length), None)

    def position_loss(self, length: int, first: int, end: int) -> float | None:
        """Nats per token at positions first <= p < end of windows of `length`, None if not measured."""
        buckets = (bucket for point in self.losses if point.length == length for bucket in point.by_position)
        return next((loss for a, b, loss in buckets if (a, b) == (first, end)), None)

    def branch_loss(self, branch: str, length: int) -> float | None:
        """Nats per token with `branch` off, None if not measured."""
        return next((b.loss for b in self.branches if (b.branch, b.length) == (branch, length)), None)

    def recall_rate(self, facts: int, distance: int) -> float | None:
        """Share of right answers, None if not measured."""
        return next((r.exact_match for r in self.recall if (r.facts, r.distance) == (facts, distance)), None)

    def diverges(self, length: int) -> Divergence | None:
        """Divergence from the teacher at `length`, None if not measured."""
        return next((found for found in self.divergence if found.length == length), None)

    def agrees(self, length: int) -> Agreement | None:
        """Agreement with the teacher at `length`, None if not measured."""
        return next((found for found in self.agreement if found.length == length), None)

    def main_metrics(self, task: str) -> list[str]:
        """The metric of `task` that tables show; all of them if it has none of the usual ones."""
        main = main_metric(self.tasks[task])
        if main is not None and "," not in main:
            return [main]
        return [name for name in self.tasks[task] if "_stderr" not in name]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measurement:
        """The inverse of `to_dict`, also after a trip through JSON."""
        losses = [
            TextLoss(**{**point, "by_position": tuple((a, b, loss) for a, b, loss in point["by_position"])})
            for point in values["losses"]
        ]
        branches = [BranchLoss(**loss) for loss in values["branches"]]
        scores = [RecallScore(**score) for score in values["recall"]]
        agree = [Agreement(**found) for found in values.get("agreement", [])]
        diverge = [Divergence(**found) for found in values.get("divergence", [])]
        lists = {"losses": losses, "branches": branches, "recall": scores, "agreement": agree, "divergence": diverge}
        items = {task: Items(**answers) for task, answers in values.get("items", {}).items()}
        asked = {task: Asked(**how) for task, how in values.get("asked", {}).items()}
        tasks: dict[str, Any] = {"items": items, "asked": asked}
        return cls(**{**values, **lists, **tasks})


def measure(
    model: Any,
    tokenizer: Any,
    config: EvalConfig,
    *,
    token_ids: torch.Tensor,
    seq_len: int,
    include_path: str | Path | Sequence[str | Path] | None = None,
    has_teacher: bool = False,
    teacher: Any = None,
    say: Callable[[str], Any] = lambda text: None,
) -> Measurement:
    """Take the measurements that `config` asks for.

    Args:
        model: a causal LM; training mode and weights are as before afterwards.
        token_ids: [N] held-out text: the losses are taken on it, and it fills the recall prompts.
        seq_len: the training length, for `config.lengths` left empty.
        include_path: folders with lm-eval task files.
        has_teacher: whether `linearize.swap.teacher_path` makes the source model of it, to be compared with.
        teacher: the source model, where it is another one in memory.
        say: receives the name of each measurement before it is taken.
    """
    lengths = list(config.lengths) or [seq_len]
    scoring: dict[str, Any] = {"windows": config.windows, "batch_size": config.rows}
    result = Measurement(notes=_length_notes(model, lengths))
    family = known_family(model.config)
    if family is not None and not family.causal:
        return _measure_encoder(result, model, config, token_ids, lengths, scoring)
    say("losses")
    result.losses = [loss_on_text(model, token_ids, length=length, **scoring) for length in lengths]
    source = _source_of(model, has_teacher, teacher)
    if source is not None and config.divergence:
        say("divergence from the teacher")
        result.divergence = [divergence_on_text(model, source, token_ids, length=n, **scoring) for n in lengths]
    if config.branches:
        say("branches")
        result.branches = branch_losses(model, token_ids, lengths=lengths, **scoring)
    if config.recall:
        say("recall")
        cases = CASES if config.recall is True else config.recall
        result.recall = recall(
            model,
            tokenizer,
            token_ids,
            cases,
            items_per_case=config.recall_items,
            batch_size=config.rows,
        )
        result.notes += [
            f"recall of {r.facts} fact(s) over {r.distance} tokens was not asked: {r.skipped}"
            for r in result.recall
            if r.skipped
        ]
    if config.tasks:
        say(f"tasks {', '.join(config.tasks)}")
        found = lm_eval_tasks(
            model,
            tokenizer,
            config.tasks,
            include_path=include_path,
            limit=config.limit,
            batch_size=config.batch_size,
            num_fewshot=config.num_fewshot,
        )
        result.tasks, result.items, result.groups = found.scores, found.items, found.groups
        result.asked = found.asked
    if config.probes:
        subject = Subject(
            model=model,
            tokenizer=tokenizer,
            text=token_ids,
            seq_len=seq_len,
            batch_size=config.rows,
            teacher=source,
        )
        result.probes = _probed(subject, config.probes, result.notes, say)
    if config.sample_prompt is not None:
        result.prompt = config.sample_prompt
        result.sample = continuation(model, tokenizer, config.sample_prompt, config.sample_tokens)
    return result


def _source_of(model: Any, has_teacher: bool, teacher: Any) -> Callable[[], AbstractContextManager[Any]] | None:
    if teacher is not None:
        return lambda: nullcontext(teacher)
    student = any(not layer.teacher for layer in swapped(model).values())
    return (lambda: _as_teacher(model)) if has_teacher and student else None


@contextmanager
def _as_teacher(model: Any) -> Iterator[Any]:
    with teacher_path(model):
        yield model


def _probed(
    subject: Subject, settings: list[dict[str, Any]], notes: list[str], say: Callable[[str], Any]
) -> list[dict[str, Any]]:
    found = []
    mixers = any(not layer.teacher for layer in swapped(subject.model).values())
    for values in settings:
        probe = probe_of(values)
        if (probe.needs_teacher and subject.teacher is None) or (probe.needs_mixers and not mixers):
            continue
        say(f"probe {values['type']}")
        with evaluating(subject.model):
            result = probe.run(subject)
        notes += [f"{values['type']}: {note}" for note in result.get("notes", [])]
        found.append({"probe": probe.config.model_dump(mode="json"), "result": result})
    return found


def _measure_encoder(
    result: Measurement, model: Any, config: EvalConfig, text: torch.Tensor, lengths: list[int], scoring: dict
) -> Measurement:
    if any(not layer.teacher for layer in swapped(model).values()):
        result.agreement = [agreement(model, text, length=length, **scoring) for length in lengths]
    if config.recall or config.tasks or config.sample_prompt or config.probes:
        result.notes.append("an encoder writes nothing, so recall, tasks, probes and samples were not measured")
    return result


def eval_tokens(config: EvalConfig, tokenizer: Any, data: DataConfig | None = None) -> torch.Tensor:
    """Token ids [N] of the held-out text, at most `TEXT_TOKENS`; every document ends with end-of-sequence.

    Args:
        config: names the text and its split; a single file is read whole, whatever the split.
        data: the training data, whose source is the default; the demo text when None.

    Raises:
        UserError: when the text cannot be read, or the training source has no such split.
    """
    if config.text or data is None:
        source = config.text or "demo"
        split = "train" if Path(source).expanduser().is_file() else config.split
        return read_tokens(source, tokenizer, split, max_tokens=TEXT_TOKENS)
    try:
        return tokens_of(data.model_copy(update={"split": config.split}), tokenizer, max_tokens=TEXT_TOKENS)
    except UserError as error:
        raise UserError(
            f"no evaluation text: {error}. Set evaluation.text to a held-out file or to demo, or evaluation.split to a "
            "split that the source has"
        ) from error


def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """What `model` writes greedily after `prompt`, at most `tokens` tokens."""
    ids = tokenizer(prompt)["input_ids"]
    (answer,) = generate_greedily(model, [ids], tokens=tokens, pad=padding_id(tokenizer))
    return tokenizer.decode(answer, skip_special_tokens=True)


def _length_notes(model: Any, lengths: list[int]) -> list[str]:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    beyond = [length for length in lengths if limit is not None and length > limit]
    return [f"length {length} is beyond the {limit} positions the source model was trained for" for length in beyond]
