"""Measures a model in memory, as the pipeline does between stages and `evaluate` does with a checkpoint.

`measure(model, tokenizer, config, token_ids=..., seq_len=...)` gives a `Measurement`, plain data that goes to
JSON and back. Put the call inside `linearize.swap.teacher_path(model)` to measure the source model.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from linearize.errors import UserError
from linearize.evals import workload
from linearize.evals.agreement import agreement
from linearize.evals.config import EvalConfig
from linearize.evals.divergence import divergence_on_text
from linearize.evals.finite import BROKEN, nulled, places, watching
from linearize.evals.lm_harness import lm_eval_tasks
from linearize.evals.measurement import Measurement
from linearize.evals.probes.base import DoesNotFit, Probe, Subject
from linearize.evals.recall_score import generate_greedily, padding_id, recall
from linearize.evals.text import branch_losses, evaluating, loss_on_text
from linearize.evals.workload import Work, recall_cases, works_on
from linearize.positions import learned
from linearize.progress import progress
from linearize.swap import swapped, teacher_path

__all__ = ["Measurement", "measure"]

logger = logging.getLogger(__name__)
Keep = Callable[[str, Callable[[], Measurement]], Measurement]
"""Receives the name of a part and what takes it, and returns what was found, now or before."""


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
    keep: Keep = lambda name, take: take(),
) -> Measurement:
    """Take the measurements that `config` asks for.

    Args:
        model: a causal LM; training mode and weights are as before afterwards.
        token_ids: [N] held-out text: the losses are taken on it, and it fills the recall prompts.
        seq_len: the training length, for `config.lengths` left empty.
        include_path: folders with lm-eval task files.
        has_teacher: whether `linearize.swap.teacher_path` makes the source model of it, to be compared with.
        teacher: the source model, where it is another one in memory.
        say: receives the name of each part before it is taken.
        keep: may give a part that was taken before; parts do not depend on each other.

    Raises:
        UserError: for lengths beyond a table of positions, and what the measurements raise.
    """
    lengths = list(config.lengths) or [seq_len]
    check_lengths(model, lengths)
    result = Measurement(notes=_length_notes(model, lengths))
    source = _source_of(model, has_teacher, teacher)
    subject = Subject(
        model=model, tokenizer=tokenizer, text=token_ids, seq_len=seq_len, batch_size=config.rows, teacher=source
    )
    for work, take in _parts(subject, config, lengths, include_path, teacher):
        result.add(keep(work.name, partial(_taken, work, take, say)))
    return result


def check_lengths(model: Any, lengths: Sequence[int]) -> None:
    """Raise a UserError for windows that a model with a table of positions cannot read."""
    limit = learned(model)
    beyond = [length for length in lengths if limit is not None and length > limit]
    if beyond:
        raise UserError(
            f"lengths: {', '.join(map(str, beyond))} is beyond the {limit} positions of this model, which are "
            f"learned and end there; choose lengths up to {limit}"
        )


def _taken(work: Work, take: Callable[[], Measurement], say: Callable[[str], Any]) -> Measurement:
    """A part, with a note if any of its numbers is none."""
    say(work.name)
    with progress(work.name, work.tokens):
        found = take()
    told = dataclasses.asdict(dataclasses.replace(found, tasks={}, probes=[]))  # those have notes of their own
    bad, n = places(told)
    if bad:
        found.notes.append(f"{work.name}: {bad} of {n} numbers are not finite and left out: {BROKEN}")
    for note in found.notes:
        if BROKEN in note:
            logger.warning("%s", note)
    return found


Part = tuple[Work, Callable[[], Measurement]]


def _parts(subject: Subject, config: EvalConfig, lengths: list[int], include_path: Any, teacher: Any) -> Iterator[Part]:
    """Each part that is asked for and fits the model, and what takes it."""
    model, text = subject.model, subject.text
    scoring: dict[str, Any] = {"windows": config.windows, "batch_size": config.rows}
    takes: dict[str, Callable[[], Measurement]] = {
        workload.AGREEMENT: lambda: _agreement(model, config, text, lengths, scoring),
        workload.LOSSES: lambda: Measurement(losses=[loss_on_text(model, text, length=n, **scoring) for n in lengths]),
        workload.DIVERGENCE: lambda: _divergence(subject, lengths, scoring),
        workload.BRANCHES: lambda: Measurement(branches=branch_losses(model, text, lengths=lengths, **scoring)),
        workload.RECALL: lambda: _recall(subject, config),
        workload.TASKS: lambda: _tasks(subject, config, include_path),
        workload.SAMPLE: lambda: _sample(subject, config.sample_prompt or "", config.sample_tokens),
    }
    asked = config.model_copy(update={"lengths": lengths})
    for work in works_on(model, asked, subject.seq_len, teacher=subject.teacher is not None):
        yield work, takes[work.kind] if work.probe is None else partial(_probed, work.probe, subject, teacher)


def _source_of(model: Any, has_teacher: bool, teacher: Any) -> Callable[[], AbstractContextManager[Any]] | None:
    if teacher is not None:
        return lambda: nullcontext(teacher)
    student = any(not layer.teacher for layer in swapped(model).values())
    return (lambda: _as_teacher(model)) if has_teacher and student else None


@contextmanager
def _as_teacher(model: Any) -> Iterator[Any]:
    with teacher_path(model):
        yield model


def _agreement(model: Any, config: EvalConfig, text: torch.Tensor, lengths: list[int], scoring: dict) -> Measurement:
    """Of an encoder."""
    found = Measurement()
    if any(not layer.teacher for layer in swapped(model).values()):
        found.agreement = [agreement(model, text, length=length, **scoring) for length in lengths]
    if config.recall or config.tasks or config.sample_prompt or config.probes:
        found.notes.append("an encoder writes nothing, so recall, tasks, probes and samples were not measured")
    return found


def _divergence(subject: Subject, lengths: list[int], scoring: dict) -> Measurement:
    assert subject.teacher is not None
    apart = partial(divergence_on_text, subject.model, subject.teacher, subject.text, **scoring)
    return Measurement(divergence=[apart(length=n) for n in lengths])


def _recall(subject: Subject, config: EvalConfig) -> Measurement:
    how = {"items_per_case": config.recall_items, "batch_size": config.rows}
    scores = recall(subject.model, subject.tokenizer, subject.text, recall_cases(config), **how)
    what = {True: "has no result", False: "was not asked"}
    notes = [
        f"recall of {r.facts} fact(s) over {r.distance} tokens {what[r.n > 0]}: {r.skipped}"
        for r in scores
        if r.skipped
    ]
    return Measurement(recall=scores, notes=notes)


def _tasks(subject: Subject, config: EvalConfig, include_path: Any) -> Measurement:
    found = lm_eval_tasks(
        subject.model,
        subject.tokenizer,
        config.tasks,
        include_path=include_path,
        limit=config.limit,
        batch_size=config.batch_size,
        num_fewshot=config.num_fewshot,
    )
    notes = [f"tasks: {', '.join(found.broken)} have no score: {BROKEN}"] if found.broken else []
    return Measurement(tasks=found.scores, items=found.items, groups=found.groups, asked=found.asked, notes=notes)


def _probed(probe: Probe, subject: Subject, teacher: Any) -> Measurement:
    key = probe.config.type
    with evaluating(subject.model), watching(subject.model, teacher) as broken:
        try:
            result: dict[str, Any] | None = probe.run(subject)
        except DoesNotFit as error:
            return _told_of(probe, None, [f"not measured: {error}"])
        lost = broken()
    if not isinstance(result, dict) or not _is_plain(result):
        raise UserError(f"{key}: run gave {str(result)[:100]}, and must give a dict of plain data, which JSON can hold")
    notes = [f"{key}: {note}" for note in result.get("notes", [])]
    if lost and not probe.tells_broken:
        result = None
        notes = [f"{key} has no result: {BROKEN}"]
    bad, n = places(result)
    if bad:
        notes.append(f"{key}: {bad} of {n} numbers are not finite and left out: {BROKEN}")
    return _told_of(probe, nulled(result), notes)


def _told_of(probe: Probe, result: Any, notes: list[str]) -> Measurement:
    return Measurement(probes=[{"probe": probe.config.model_dump(mode="json"), "result": result}], notes=notes)


def _is_plain(data: Any) -> bool:
    try:
        json.dumps(data)
    except (TypeError, ValueError):
        return False
    return True


def _sample(subject: Subject, prompt: str, tokens: int) -> Measurement:
    limit = learned(subject.model)
    length = len(subject.tokenizer(prompt)["input_ids"])
    if limit is not None:
        tokens = min(tokens, limit - length)
    if tokens < 1:
        return Measurement(notes=[f"the prompt was not continued: it has {length} tokens, the model {limit} positions"])
    with watching(subject.model) as broken:
        text = continuation(subject.model, subject.tokenizer, prompt, tokens)
        if broken():
            return Measurement(notes=[f"the prompt was not continued: {BROKEN}"])
    return Measurement(prompt=prompt, sample=text)


def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """What `model` writes greedily after `prompt`, at most `tokens` tokens."""
    ids = tokenizer(prompt)["input_ids"]
    (answer,) = generate_greedily(model, [ids], tokens=tokens, pad=padding_id(tokenizer))
    return tokenizer.decode(answer, skip_special_tokens=True)


def _length_notes(model: Any, lengths: list[int]) -> list[str]:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    beyond = [length for length in lengths if limit is not None and length > limit]
    return [f"length {length} is beyond the {limit} positions the source model was trained for" for length in beyond]
