"""What a model card says to machines: licence, base model, data sets, task and evaluation results.

`card_data` makes it for a new checkpoint, and `for_repository` fits a finished card to the repository it is pushed to.
What is known of the source model is copied from its own card; nothing is guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from linearize.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from linearize.evals.measure import Measurement
    from linearize.plan import Plan
    from linearize.recipe import Recipe

COPIED = ("license", "license_name", "license_link", "language")
"""What a converted model has in common with its source."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TASK = ("text-generation", "Text generation")
"""What every result belongs to."""
PLACE = 'path = "path/to/this/folder"'
"""The line of a card's usage that names the checkpoint."""


def card_data(recipe: Recipe, plan: Plan, measurements: Mapping[str, Measurement], auto_class: str) -> ModelCardData:
    """The metadata of a new checkpoint's card.

    Args:
        recipe: the resolved recipe.
        plan: what was swapped.
        measurements: name of the point -> what was measured there; the last one is the finished student, unless it is
            the teacher.
        auto_class: the Auto class of transformers that loads the model.
    """
    from huggingface_hub import ModelCardData

    source = recipe.resolved_model()
    on_hub = not Path(source).exists()
    results: list[EvalResult] = []
    if measurements and (last := list(measurements)[-1]) != "teacher" and recipe.evaluation is not None:
        told = recipe.evaluation
        name = recipe.data.name if told.text is None else None
        results = eval_results(measurements[last], told.text or recipe.data.source, told.split, name)
    data = ModelCardData(
        **source_metadata(source, recipe.model.revision),
        library_name="transformers",
        pipeline_tag=pipeline_tag(auto_class),
        base_model=source if on_hub else None,
        datasets=hub_datasets(recipe) or None,
        tags=["linearize", "linear-attention", plan.mixer["type"]],
        eval_results=results or None,
        model_name=f"{Path(recipe.model.name).name}-{plan.mixer['type']}" if results else None,
    )
    if on_hub:
        data["base_model_relation"] = "finetune"
    return data


def source_metadata(source: str, revision: str | None = None) -> dict[str, Any]:
    """What the card of the model `source` says of its licence and language; empty where there is no card to read.

    Args:
        source: a folder, or a hub name, whose card is read from the hub or the local cache.
    """
    from huggingface_hub import hf_hub_download, metadata_load
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    path = Path(source) / "README.md"
    local = Path(source).exists()
    try:
        if not local:
            path = Path(hf_hub_download(source, "README.md", revision=revision))
        found = metadata_load(path) or {}
    except (OSError, EntryNotFoundError, HFValidationError, ValueError, yaml.YAMLError):
        return {}  # no card, no access, no network, or a card that nobody can read: then its licence is not known
    told = {key: found[key] for key in COPIED if isinstance(found.get(key), str | list)}
    link = told.get("license_link")
    if isinstance(link, str) and not link.startswith("http"):  # relative to the source's repository
        if local:
            del told["license_link"]
        else:
            told["license_link"] = f"https://huggingface.co/{source}/blob/main/{link.removeprefix('./')}"
    return told


def pipeline_tag(auto_class: str) -> str | None:
    """The task of transformers' pipelines that takes models of `auto_class`: the first one, if there is any."""
    from transformers.pipelines import SUPPORTED_TASKS

    known: dict[str, Any] = SUPPORTED_TASKS
    tasks = (task for task, told in known.items() if auto_class in [cls.__name__ for cls in told["pt"]])
    return next(tasks, None)


def hub_datasets(recipe: Recipe) -> list[str]:
    """Hub names of the training data, of all stages, each once."""
    sources = [recipe.stage_data(stage).source for stage in recipe.stages if "tokens" in stage]
    return list(dict.fromkeys(source for source in sources if _is_hub_dataset(source)))


def _is_hub_dataset(source: str) -> bool:
    local = source == "demo" or Path(source).expanduser().exists() or Path(source).suffix in (".txt", ".jsonl", ".json")
    return not local and HUB_NAME.fullmatch(source) is not None


def eval_results(m: Measurement, text: str, split: str | None, name: str | None = None) -> list[EvalResult]:
    """The measurements of one model in the structured form of model cards (`model-index`).

    Args:
        m: what was measured.
        text: the held-out text of losses and divergence: a hub name, a file (of which only the name is told) or `demo`.
        split: its split.
        name: configuration of that data set.
    """
    shown = text if _is_hub_dataset(text) or text == "demo" else Path(text).name
    on = {"dataset_type": shown, "dataset_name": shown, "dataset_config": name, "dataset_split": split}
    found = [
        _result("loss", p.loss, f"loss at {p.length:,} tokens (nats per token)", {"length": p.length}, **on)
        for p in m.losses
    ]
    found += [
        _result("kl_divergence", d.kl, f"KL to the teacher at {d.length:,} tokens (nats)", {"length": d.length}, **on)
        for d in m.divergence
    ]
    synthetic = {"dataset_type": "synthetic-recall", "dataset_name": "Synthetic recall"}
    for r in m.recall:
        if r.exact_match is not None:
            label = f"recall of {r.facts} fact{'s' * (r.facts > 1)} over {r.distance:,} tokens"
            args = {"facts": r.facts, "distance": r.distance, "questions": r.n}
            found.append(_result("exact_match", r.exact_match, label, args, **synthetic))
    for task, metrics in m.tasks.items():
        for metric, value in metrics.items():
            if not metric.partition(",")[0].endswith("_stderr"):
                error = next((metrics[k] for k in (f"{metric}_stderr", _stderr(metric)) if k in metrics), None)
                stderr = None if error is None or not math.isfinite(error) else {"stderr": float(error)}
                label = f"{metric} (lm-evaluation-harness)"
                found.append(_result(metric, value, label, stderr, dataset_type=task, dataset_name=task))
    return [result for result in found if math.isfinite(result.metric_value)]


def _stderr(metric: str) -> str:
    """`exact_match,strict` -> `exact_match_stderr,strict`, as the harness writes it."""
    name, comma, rest = metric.partition(",")
    return f"{name}_stderr{comma}{rest}"


def _result(metric: str, value: float, label: str, args: dict | None, **dataset: str | None) -> EvalResult:
    from huggingface_hub import EvalResult

    told = {"metric_type": metric, "metric_name": label, "metric_args": args, "metric_value": round(float(value), 6)}
    return EvalResult(task_type=TASK[0], task_name=TASK[1], **told, **dataset)  # type: ignore[arg-type]


def for_repository(
    text: str,
    repo: str,
    *,
    adapter_of: str | None = None,
    results: Iterable[EvalResult] = (),
    read_source: bool = True,
) -> str:
    """The card `text` as it stands in the hub repository `repo`.

    The title and the usage name the repository; a licence and a language that were not to be read when the card was
    written are looked up once more. What a user wrote into the card stays.

    Args:
        text: a card of `linearize.hf.card`, perhaps edited.
        repo: `USER/NAME`.
        adapter_of: for an adapter alone, the hub name of the converted checkpoint that it belongs to, "" if that is
            nowhere on the hub.
        results: further evaluation results.
        read_source: whether the source model's card may be looked up.

    Raises:
        UserError: for a card whose metadata cannot be read.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"the metadata at the top of README.md cannot be read: {error}; correct or remove it"
        ) from error
    data = card.data
    source = data.get("base_model")
    if read_source and isinstance(source, str) and data.get("license") is None:
        for key, value in source_metadata(source).items():
            if data.get(key) is None:
                data[key] = value
    if results := list(results):
        data["eval_results"] = [*(data.get("eval_results") or []), *results]
    if data.get("eval_results"):
        data["model_name"] = repo.partition("/")[2]
    place = f'path = "{repo}"'
    if adapter_of is not None:
        place = f'path = "{adapter_of or "path/to/the/converted/checkpoint"}"'
        data["library_name"] = "peft"
        if adapter_of or source:
            data["base_model"], data["base_model_relation"] = adapter_of or source, "adapter"
    body = card.text.replace(PLACE, place, 1)
    if adapter_of is not None:
        body = body.replace('from_pretrained(model, path, subfolder="adapter")', f'from_pretrained(model, "{repo}")', 1)
    body = re.sub(r"\A(\s*)# (.*)", rf"\1# {repo}: \2", body)
    head = data.to_yaml()
    return f"---\n{head}\n---\n{body}" if head != "{}" else body.lstrip("\n")
