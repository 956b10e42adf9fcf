"""Measurements as the evaluation results of a model card (`model-index`), so that none is taken for what it is not.

huggingface_hub's `EvalResult` has no field for a remark, and `verified` is the hub's own to set. So a task of which
only some questions were asked, or whose questions are the user's own, gets a data set of another type and name, by
which the hub lists results, and the name and arguments of its metrics say so too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.evals.items import Asked
from linearize.model_names import ALIASES

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from linearize.evals.measure import Measurement

FILES = (".txt", ".jsonl", ".json", ".parquet")
"""Endings of texts that are files, also where they lie on another machine."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TASK = ("text-generation", "Text generation")
"""What every result belongs to."""


def is_hub_dataset(source: str) -> bool:
    """Whether a source of text is the name of a data set on the hub."""
    local = source == "demo" or Path(source).expanduser().exists() or Path(source).suffix in FILES
    return not local and HUB_NAME.fullmatch(source) is not None


def model_name(name: str) -> str:
    """A model as strangers know it: an alias as its hub name, a folder by its own name alone."""
    name = ALIASES.get(name, name)
    path = Path(name).expanduser()
    local = name != "demo" and (path.exists() or HUB_NAME.fullmatch(name) is None)
    return path.resolve().name if local else name


def held_out(text: str | None, split: str | None, source: str, name: str | None) -> dict[str, Any]:
    """On which text losses were taken, as arguments of `eval_results`.

    Args:
        text: `evaluation.text` of a recipe or a report; a file is read whole, whatever the split.
        split: `evaluation.split`.
        source: `data.source` of the recipe, which stands for a text that is not told.
        name: `data.name`, the configuration of that source.
    """
    if text is None:
        return {"text": source, "split": split, "name": name}
    return {"text": text, "split": None if Path(text).suffix in FILES else split, "name": None}


def eval_results(
    m: Measurement,
    *,
    text: str,
    split: str | None,
    name: str | None = None,
    limit: int | None = None,
    teacher: str | None = None,
) -> list[EvalResult]:
    """The measurements of one model in the structured form of model cards.

    Args:
        m: what was measured.
        text: the held-out text of losses and divergence: a hub name, a file (of which only the name is told) or `demo`.
        split: its split.
        name: configuration of that data set.
        limit: questions asked of each task at most, where `m` does not say itself how it was asked.
        teacher: the model that predictions were compared with: an alias, a hub name or a folder (of which only the name
            is told); None where that is not known.
    """
    shown = text if is_hub_dataset(text) or text == "demo" else Path(text).name
    on = {"dataset_type": shown, "dataset_name": shown, "dataset_config": name, "dataset_split": split}
    found = []
    for p in m.losses:
        label = f"loss at {p.length:,} tokens, {p.windows:,} windows (nats per token)"
        found.append(_result("loss", p.loss, label, {"length": p.length, "windows": p.windows}, **on))
    compared = {} if teacher is None else {"teacher": model_name(teacher)}
    for d in m.divergence:  # on the windows of the losses
        label = f"KL to {compared.get('teacher', 'the teacher')} at {d.length:,} tokens (nats)"
        taken = [{"windows": p.windows} for p in m.losses if p.length == d.length]
        args = {"length": d.length, **(taken or [{}])[0], **compared}
        found.append(_result("kl_divergence", d.kl, label, args, **on))
    synthetic = {"dataset_type": "synthetic-recall", "dataset_name": "Synthetic recall"}
    for r in m.recall:
        if r.exact_match is not None:
            label = f"recall of {r.facts} fact{'s' * (r.facts > 1)} over {r.distance:,} tokens, {r.n} questions"
            asked = {"facts": r.facts, "distance": r.distance, "questions": r.n}
            found.append(_result("exact_match", r.exact_match, label, asked, **synthetic))
    for task, metrics in m.tasks.items():
        found += _of_task(task, metrics, m.asked.get(task) or _guessed(m, task, limit))
    return [result for result in found if math.isfinite(result.metric_value)]


def merged(results: Iterable[EvalResult]) -> list[EvalResult]:
    """Each result once: of the same metric of the same data, taken with the same settings, the last one."""
    found: dict[str, EvalResult] = {}
    for result in results:
        told = {**vars(result), "metric_value": None}
        told["metric_args"] = {k: v for k, v in (result.metric_args or {}).items() if k != "stderr"}
        found[json.dumps(told, sort_keys=True, default=str)] = result
    return list(found.values())


def remarks(asked: Asked | None) -> list[str]:
    """What must be said beside a task's score, because it is not the benchmark's; nothing where that is not known."""
    found = []
    if asked is not None and asked.own:
        found.append("the author's own questions, not the benchmark's")
    if asked is not None and _is_part(asked):
        found.append(f"only {asked.questions:,} of {'all' if asked.of is None else f'{asked.of:,}'} questions")
    return found


def _is_part(asked: Asked) -> bool:
    return asked.of is None or asked.questions < asked.of


def _guessed(m: Measurement, task: str, limit: int | None) -> Asked | None:
    """How a task was asked in a measurement that is too old to say it, where there was a limit."""
    if limit is None:
        return None
    counted = sum(len(m.items[one].right) for one in (task, *m.groups.get(task, ())) if one in m.items)
    return Asked(counted or limit, None, None, own=False)


def _of_task(task: str, metrics: Mapping[str, float], asked: Asked | None) -> list[EvalResult]:
    kind, how, said = task, "lm-evaluation-harness", remarks(asked)
    args: dict[str, float | None] = {}
    if asked is not None:
        args = {"num_few_shot": asked.shots, "questions": asked.questions}
        how = how if asked.shots is None else f"{asked.shots}-shot, {how}"
        kind = f"own-{kind}" if asked.own else kind
        kind = f"{kind}-first-{asked.questions}" if _is_part(asked) else kind
    name = f"{task} ({'; '.join(said)})" if said else task
    found = []
    for metric, value in metrics.items():
        if not metric.partition(",")[0].endswith("_stderr"):
            error = next((metrics[k] for k in (f"{metric}_stderr", _stderr(metric)) if k in metrics), None)
            finite = {"stderr": float(error)} if error is not None and math.isfinite(error) else {}
            told = {key: value for key, value in args.items() if value is not None} | finite
            label = f"{metric} ({'; '.join([how, *said])})"
            found.append(_result(metric, value, label, told or None, dataset_type=kind, dataset_name=name))
    return found


def _stderr(metric: str) -> str:
    """`exact_match,strict` -> `exact_match_stderr,strict`, as the harness writes it."""
    name, comma, rest = metric.partition(",")
    return f"{name}_stderr{comma}{rest}"


def _result(metric: str, value: float, label: str, args: dict | None, **dataset: str | None) -> EvalResult:
    from huggingface_hub import EvalResult

    told = {"metric_type": metric, "metric_name": label, "metric_args": args, "metric_value": round(float(value), 6)}
    return EvalResult(task_type=TASK[0], task_name=TASK[1], **told, **dataset)  # type: ignore[arg-type]
