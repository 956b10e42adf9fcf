"""What a model card says to machines: licence, base model, data sets, task and evaluation results.

`card_data` makes it for a new checkpoint, and `for_repository` fits a finished card to the repository it is pushed to.
What is known of the source model is copied from its own card; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from linearize.errors import UserError
from linearize.hub.card_results import eval_results, held_out, is_hub_dataset, merged
from linearize.hub.licence import licence_files, licence_metadata
from linearize.hub.online import cache_if_unreachable

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from linearize.evals.measure import Measurement
    from linearize.plan import Plan
    from linearize.recipe import Recipe

COPIED = ("license", "license_name", "license_link", "language")
"""What a converted model has in common with its source."""
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
    on_hub = not Path(source).expanduser().exists()
    results: list[EvalResult] = []
    if measurements and (last := list(measurements)[-1]) != "teacher" and recipe.evaluation is not None:
        told = recipe.evaluation
        on = held_out(told.text, told.split, recipe.data.source, recipe.data.name)
        results = eval_results(measurements[last], **on, teacher=recipe.model.name)
    data = ModelCardData(
        **source_metadata(source, recipe.model.revision),
        library_name="transformers",
        pipeline_tag=pipeline_tag(auto_class),
        base_model=source if on_hub else None,
        datasets=hub_datasets(recipe) or None,
        tags=["linearize", "linear-attention", plan.mixer["type"]],
        eval_results=results or None,
        model_name=f"{Path(recipe.model.name).name}-{recipe.origin.stem or plan.mixer['type']}" if results else None,
    )
    if on_hub:
        data["base_model_relation"] = "finetune"
    return data


def source_metadata(source: str, revision: str | None = None) -> dict[str, Any]:
    """What the card of the model `source`, or the licence beside it, says of its licence and language; empty where
    there is neither.

    Args:
        source: a folder, or a hub name, whose card is read from the hub or the local cache.
    """
    from huggingface_hub import hf_hub_download, metadata_load
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    path = Path(source).expanduser() / "README.md"
    local = path.parent.exists()
    try:
        if not local:
            with cache_if_unreachable():
                path = Path(hf_hub_download(source, "README.md", revision=revision))
        found = metadata_load(path) or {}
    except (OSError, EntryNotFoundError, HFValidationError, ValueError, yaml.YAMLError):
        found = {}  # no card, no access, no network, or a card that nobody can read: then its licence is not known
    told = {key: found[key] for key in COPIED if isinstance(found.get(key), str | list)}
    if local:
        return licence_metadata(told, licence_files(source))
    link = told.get("license_link")
    if isinstance(link, str) and not link.startswith("http"):  # relative to the source's repository
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
    return list(dict.fromkeys(source for source in sources if is_hub_dataset(source)))


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
        text: a card of `linearize.hub.card`, perhaps edited.
        repo: `USER/NAME`.
        adapter_of: for an adapter alone, the hub name of the converted checkpoint that it belongs to, "" if that is
            nowhere on the hub.
        results: further evaluation results, later ones last; they replace those of the same data and settings.
        read_source: whether the source model's card may be looked up.

    Raises:
        UserError: for a card whose metadata cannot be read.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text)
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
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
        data["eval_results"] = merged([*(data.get("eval_results") or []), *results])
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
