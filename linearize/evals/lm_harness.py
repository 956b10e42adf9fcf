"""Runs EleutherAI's lm-evaluation-harness on a model that is already in memory.

`lm_eval_tasks(model, tokenizer, ["piqa"])` gives the harness's own numbers; `include_path` adds a folder of
task files of your own. The harness is imported only here, inside the functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linearize.errors import UserError, did_you_mean
from linearize.evals.text import evaluating


def lm_eval_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 4,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, float]]:
    """Scores of the tasks and groups, `{task: {metric: value}}`, standard errors as `<metric>_stderr`.

    A metric with a filter other than none is called `<metric>,<filter>`, as the harness prints it.

    Args:
        include_path: folder with task files; the harness's own index is read only if a task is not in it.
        limit: examples per task; all when None.
        num_fewshot: examples in the prompt; the task's own choice when None.

    Raises:
        UserError: when the harness is missing or a task is unknown.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(
            f"tasks need the lm-evaluation-harness ({error}); run: pip install 'lm-eval[hf]>=0.4.13'"
        ) from error
    manager = _task_manager(tasks, include_path)
    with evaluating(model):
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
        )
    return {task: _metrics(values) for task, values in results["results"].items()}


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """A task manager that knows `tasks`: reading the harness's whole index takes 12 s, one folder 0.1 s."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not Path(include_path).is_dir():
            raise UserError(f"no folder {str(include_path)!r} with task files; `include_path` must name one")
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(manager.match_tasks([task]) for task in tasks):
            return manager
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if not manager.match_tasks([task]):
            hint = did_you_mean(task, manager.all_tasks).split("known:")[0].rstrip("; ")
            raise UserError(f"unknown lm-eval task {task!r}{hint}; `lm_eval ls tasks` lists them")
    return manager


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """The harness's "acc,none" -> "acc"; drops what is not a number."""
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items() if "," in key}
