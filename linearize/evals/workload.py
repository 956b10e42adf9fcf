"""What an evaluation is going to do, known before it starts: its measurements, and how much each of them reads.

`workload(config, 2048)` tells it from settings alone. A model or a text may turn out to be too short for some of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from linearize.evals.config import EvalConfig
from linearize.evals.probes.base import Probe, Rows, probe_of
from linearize.evals.recall import LEAD
from linearize.evals.recall_score import CASES
from linearize.mixers.base import branches_of
from linearize.registry import known_family
from linearize.swap import swapped

LOSSES, DIVERGENCE, BRANCHES, RECALL = "losses", "divergence from the teacher", "branches", "recall"
TASKS, PROBE, SAMPLE, AGREEMENT = "tasks", "probe", "sample", "agreement"
"""Kinds of measurements."""


@dataclass(frozen=True)
class Work:
    """A measurement that will be taken."""

    kind: str
    rows: Rows = ()
    unit: str = "windows"
    """What the rows are."""
    times: int = 1
    """How often they are read."""
    what: str = ""
    """Which of its kind."""
    probe: Probe | None = None

    @property
    def name(self) -> str:
        """What no other measurement of the model is called."""
        return f"{self.kind} {self.what}".rstrip()

    @property
    def tokens(self) -> int:
        """Tokens that a model reads and writes, roughly; 0 where that is open."""
        return self.times * sum(number * tokens for number, tokens in self.rows)

    def __str__(self) -> str:
        told = [f"{number:,} {self.unit}" + f" of {tokens:,} tokens" * bool(tokens) for number, tokens in self.rows[:1]]
        told += [f"{number:,}" + f" of {tokens:,}" * bool(tokens) for number, tokens in self.rows[1:]]
        often = f"{self.times} times " if self.times > 1 else ""
        return f"{self.name}: {often}{', '.join(told)}" if told else self.name


def workload(
    config: EvalConfig,
    seq_len: int,
    *,
    branches: int,
    teacher: bool = True,
    mixers: bool = True,
    causal: bool = True,
    questions: Mapping[str, int] | None = None,
) -> list[Work]:
    """The measurements of one model, in their order.

    Args:
        seq_len: the training length.
        branches: how many the mixers have.
        teacher: whether there is another model to compare with.
        mixers: whether the model runs mixers.
        causal: whether it predicts the next token; encoders do not.
        questions: how many are asked of each task, where that is known.
    """
    windows = [(config.windows, length) for length in config.lengths or [seq_len]]
    if not causal:
        return [Work(AGREEMENT, windows if mixers else ())]
    works = [Work(LOSSES, windows)]
    if config.divergence and teacher:
        works.append(Work(DIVERGENCE, windows))
    if config.branches and branches:
        works.append(Work(BRANCHES, windows, times=branches))
    if config.recall:
        asked = [(config.recall_items, LEAD + distance) for _, distance in recall_cases(config)]
        works.append(Work(RECALL, asked, "questions"))
    if config.tasks:
        count = [(sum(questions.values()), 0)] if questions else []
        works.append(Work(TASKS, count, "questions", what=", ".join(config.tasks)))
    works += _probes(config, seq_len, teacher, mixers)
    return works + [Work(SAMPLE)] * (config.sample_prompt is not None)


def works_on(
    model: Any, config: EvalConfig, seq_len: int, *, teacher: bool, questions: Mapping[str, int] | None = None
) -> list[Work]:
    """`workload` of a model in memory, or of its teacher inside `linearize.swap.teacher_path`."""
    family = known_family(model.config)
    mixers = any(not layer.teacher for layer in swapped(model).values())
    return workload(
        config,
        seq_len,
        branches=len(branches_of(model)) if mixers else 0,
        teacher=teacher,
        mixers=mixers,
        causal=family is None or family.causal,
        questions=questions,
    )


def recall_cases(config: EvalConfig) -> Sequence[tuple[int, int]]:
    """(facts, tokens in between) of the recall questions."""
    if isinstance(config.recall, bool):
        return CASES if config.recall else ()
    return config.recall


def summary(works: Sequence[Work]) -> list[str]:
    """How much it is in all, then a line for each."""
    exact = sum(work.tokens for work in works)
    tokens = f"about {round(exact, 2 - len(str(exact))):,} tokens"
    return [f"{tokens} and tasks" if any(work.kind == TASKS for work in works) else tokens, *map(str, works)]


def _probes(config: EvalConfig, seq_len: int, teacher: bool, mixers: bool) -> list[Work]:
    """Those that fit the model; of several of a type all but the first have a number."""
    works: list[Work] = []
    kinds: list[str] = []
    for values in config.probes:
        probe = probe_of(values)
        if (probe.needs_teacher and not teacher) or (probe.needs_mixers and not mixers):
            continue
        kinds.append(kind := values["type"])
        number = f" ({n})" if (n := kinds.count(kind)) > 1 else ""
        works.append(Work(PROBE, probe.rows(seq_len), probe.unit, what=f"{kind}{number}", probe=probe))
    return works
