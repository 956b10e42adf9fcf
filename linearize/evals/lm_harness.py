"""Runs EleutherAI's lm-evaluation-harness on a model that is already in memory.

`lm_eval_tasks(model, tokenizer, ["piqa"])` gives the harness's own numbers, and what was answered to every question;
`include_path` adds folders of task files of your own. The harness is imported only inside the functions.
"""

from __future__ import annotations

import functools
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tqdm.auto import tqdm

from linearize.errors import UserError, did_you_mean
from linearize.evals.fewshot import Room, check_examples, is_short_of_examples
from linearize.evals.finite import watching
from linearize.evals.items import Asked, Items, items_of
from linearize.evals.task_groups import GROUPS, asked_groups, expand, group_mean, leaves
from linearize.evals.text import evaluating
from linearize.progress import on_a_terminal


@dataclass(frozen=True)
class TaskResults:
    """What the harness found."""

    scores: dict[str, dict[str, float]]
    """{task or group: {metric: value}}; standard errors are called `<metric>_stderr`, and a metric of a filter other
    than none `<metric>,<filter>`. A group without numbers of the harness has the `mean` of its tasks' main metrics."""
    items: dict[str, Items]
    """The answers to each question of tasks whose main metric is right or wrong."""
    groups: dict[str, list[str]]
    """The tasks of each group."""
    asked: dict[str, Asked] = field(default_factory=dict)
    """How each task and group was asked."""
    broken: list[str] = field(default_factory=list)
    """Tasks, and groups of them, without a score, because predictions were NaN or infinite: their metrics are NaN."""


def lm_eval_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | Sequence[str | Path] | None = None,
    limit: int | None = None,
    batch_size: int | str = 4,
    num_fewshot: int | None = None,
) -> TaskResults:
    """Run tasks and groups, also those of `linearize.evals.task_groups`.

    Args:
        include_path: folders with task files; the harness's own index is read only if a task is not in them.
        limit: examples per task; all when None.
        batch_size: rows per forward, or "auto": see `linearize.evals.lm_eval_model.LinearizeLM`.
        num_fewshot: examples in the prompt; the task's own choice when None, or where the task says 0.

    Raises:
        UserError: when the harness is missing or a task is unknown.
    """
    try:
        from lm_eval import simple_evaluate

        from linearize.evals.lm_eval_model import in_memory
    except ImportError as error:
        raise _no_harness(error) from error
    names = expand(tasks)
    manager = _task_manager(names, include_path)
    try:
        with evaluating(model), own_random_numbers(), _quiet(), watching(model) as broken:
            found = simple_evaluate(
                model=in_memory(model, tokenizer, batch_size),
                tasks=names,
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=1000,
                log_samples=True,
            )
            lost = broken()
    except OverflowError as error:
        raise UserError(
            f"a perplexity among {', '.join(names)} is too large for a number ({error}): the model finds some text "
            "next to impossible; leave out tasks that report one"
        ) from error
    except ConnectionError as error:
        raise _no_questions(", ".join(names), error) from error
    except (ValueError, AssertionError) as error:
        if not is_short_of_examples(error):
            raise
        raise UserError(
            f"a task among {', '.join(names)} has fewer questions than the examples that its prompts shall have; "
            "give a smaller num_fewshot"
        ) from error
    return _read(found, tasks, _own(manager, include_path), lost)


def fetch_tasks(
    tasks: Sequence[str],
    include_path: str | Path | Sequence[str | Path] | None = None,
    limit: int | None = None,
    *,
    num_fewshot: int | None = None,
    room: Callable[[], Room | None] = lambda: None,
) -> dict[str, int]:
    """Read the questions of all tasks, from the hub where they are not in its cache: what is missing is then known
    before anything is measured.

    Args:
        num_fewshot: as `lm_eval_tasks` will get it.
        room: gives what prompts with so many examples have to fit into.

    Returns:
        {task: how many of its questions will be asked}, of a group of the harness those of all its tasks.

    Raises:
        UserError: when the harness is missing, a task is unknown, its questions cannot be had, or `num_fewshot`
            examples are not there or do not fit.
    """
    if not tasks:
        return {}
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise _no_harness(error) from error
    names = expand(tasks)
    manager = _task_manager(names, include_path)
    space = room() if num_fewshot else None
    counts = {}
    for name in names:
        try:
            with own_random_numbers():
                found = manager.load([name])["tasks"].values()
                sizes = [len(task.eval_docs) for task in found]
        except Exception as error:  # whatever datasets, the hub's client and the code of a task raise
            raise _no_questions(name, error) from error
        with own_random_numbers():
            for task in found:
                check_examples(task, num_fewshot or 0, space)
        counts[name] = sum(min(size, limit or size) for size in sizes)
    return counts


def _no_questions(task: str, error: Exception) -> UserError:
    return UserError(
        f"task {task}: its questions cannot be read ({type(error).__name__}: {error}). If they come from the hub, "
        "check the network, and that HF_DATASETS_OFFLINE and HF_HUB_OFFLINE are set only where its cache holds them; "
        "if the task file is your own, check it; or leave the task out. `linearize evaluate --tasks-from FOLDER` asks "
        "questions of your own without the hub"
    )


def _no_harness(error: ImportError) -> UserError:
    return UserError(f"tasks need the lm-evaluation-harness ({error}); run: pip install 'lm-eval[hf]>=0.4.13'")


def _own(manager: Any, include_path: str | Path | Sequence[str | Path] | None) -> set[str]:
    """Names of the tasks whose files lie in the user's folders."""
    folders = [Path(folder).resolve() for folder in _folders(include_path)]
    files = {name: entry.yaml_path for name, entry in manager.task_index.items() if entry.yaml_path is not None}
    return {name for name, file in files.items() if any(Path(file).resolve().is_relative_to(f) for f in folders)}


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Inside the context the global random numbers of Python, numpy and torch may be seeded, as the harness does;
    afterwards they go on as if nothing had been.
    """
    ours, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside the context the harness neither looks for git and pip, which takes seconds and can print errors that are
    none, nor warns that a model is in memory, nor draws a bar that nobody sees.
    """
    from lm_eval import evaluator
    from lm_eval.api import task

    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    with (
        mock.patch.object(evaluator, "get_git_commit_hash", lambda: None),
        mock.patch.object(evaluator, "add_env_info", lambda results: None),
        mock.patch.object(
            task, "tqdm", functools.partial(tqdm, desc="prompts", leave=False, disable=not on_a_terminal())
        ),
    ):
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _read(found: dict[str, Any], asked: Sequence[str], own: set[str], lost: bool) -> TaskResults:
    scores = {task: _metrics(values) for task, values in found["results"].items()}
    groups = asked_groups(asked) | leaves(found["group_subtasks"])
    broken = [task for task, kept in found["samples"].items() if lost and any(map(_is_broken, kept))]
    broken += [group for group, members in groups.items() if not {*members}.isdisjoint(broken)]
    scores |= {task: dict.fromkeys(scores[task], math.nan) for task in broken if task in scores}
    for group, members in groups.items():
        mean = group_mean(members, scores)
        if mean is not None and not scores.get(group):
            scores[group] = {"mean": mean}
    delimiters = {task: config.get("target_delimiter", " ") for task, config in found["configs"].items()}
    samples = {task: kept for task, kept in found["samples"].items() if task not in broken}
    answered = {task: items_of(kept, scores[task], delimiters[task]) for task, kept in samples.items()}
    scores = {task: scores[task] for task in (*groups, *scores) if scores.get(task)}
    told = {
        task: Asked(n["effective"], n["original"], found["n-shot"].get(task), task in own)
        for task, n in found["n-samples"].items()
    }
    told |= {group: _together([told[task] for task in members if task in told]) for group, members in groups.items()}
    items = {task: answers for task, answers in answered.items() if answers is not None}
    return TaskResults(scores, items, groups, told, [task for task in broken if task in scores])


def _together(asked: Sequence[Asked]) -> Asked:
    """How the tasks of a group were asked."""
    shots = {each.shots for each in asked}
    return Asked(
        sum(each.questions for each in asked),
        sum(each.of or 0 for each in asked),
        shots.pop() if len(shots) == 1 else None,
        any(each.own for each in asked),
    )


def _is_broken(sample: dict[str, Any]) -> bool:
    """Whether a likelihood behind an answer is no number; of written text nobody knows, and a broken model wrote it."""
    return any(
        isinstance(value, str) or (isinstance(value, float) and math.isnan(value)) for value in _flat(sample["resps"])
    )


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)
    else:
        yield values


def _task_manager(tasks: Sequence[str], include_path: str | Path | Sequence[str | Path] | None) -> Any:
    """A task manager that knows `tasks`: reading the harness's whole index takes 12 s, one folder 0.1 s."""
    from lm_eval.tasks import TaskManager

    folders = _folders(include_path)
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"no folder {str(folder)!r} with task files; `include_path` must name one")
    paths = [str(folder) for folder in folders]
    if paths:
        manager = TaskManager(include_path=paths, include_defaults=False)
        if all(manager.match_tasks([task]) for task in tasks):
            return manager
    manager = TaskManager(include_path=paths) if paths else _all_of_the_harness()
    for task in tasks:
        if not manager.match_tasks([task]):
            hint = did_you_mean(task, [*manager.all_tasks, *GROUPS]).split("known:")[0].rstrip("; ")
            raise UserError(f"unknown lm-eval task {task!r}{hint}; `lm_eval ls tasks` lists them")
    return manager


@functools.cache
def _all_of_the_harness() -> Any:
    """A task manager of the harness's own tasks."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _folders(include_path: str | Path | Sequence[str | Path] | None) -> list[str | Path]:
    return [include_path] if isinstance(include_path, str | Path) else list(include_path or ())


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """The harness's "acc,none" -> "acc"; drops what is not a number."""
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items() if "," in key}
