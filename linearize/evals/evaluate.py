"""Evaluates a checkpoint on disk or on the hub, a converted one side by side with the model it came from.

`evaluate("runs/my-model", tasks=["piqa"])` returns a `Report`: `print(report.table())` shows it, `to_json`
keeps it. Between the stages of a conversion, use `linearize.evals.measure` on the live model instead.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from pydantic import ValidationError

import linearize
from linearize.data import DataConfig
from linearize.device import default_device
from linearize.errors import UserError
from linearize.evals.config import EvalConfig
from linearize.evals.fewshot import room_of
from linearize.evals.held_out import check_evaluation, check_text, eval_tokens
from linearize.evals.lm_harness import fetch_tasks
from linearize.evals.local_tasks import local_tasks
from linearize.evals.measure import Measurement, check_lengths, measure
from linearize.evals.parts import (
    Parts,
    check_report,
    files_made_of,
    held_report,
    model_made_of,
    named_files,
    text_made_of,
)
from linearize.evals.probes.base import probe_of
from linearize.evals.report import Report
from linearize.evals.task_groups import GROUPS
from linearize.evals.workload import summary, works_on
from linearize.hf.folder import read_mapping, recipe_in
from linearize.hf.load import hub_file, load, load_config, load_tokenizer
from linearize.model_names import resolve_model
from linearize.positions import learned, may_end
from linearize.schema import user_error

DEFAULT_LENGTH = 2048
"""Context length for models without a recipe, where they have that many positions."""


def evaluate(
    path: str | Path,
    *,
    teacher: str | Path | bool | None = None,
    tasks: Sequence[str] = (),
    text: str | None = None,
    split: str | None = None,
    lengths: Sequence[int] | None = None,
    windows: int = 64,
    recall: bool | Sequence[tuple[int, int]] = True,
    recall_items: int = 32,
    branches: bool = True,
    divergence: bool = True,
    probes: Sequence[str | Mapping[str, Any]] = (),
    sample_prompt: str | None = None,
    include_path: str | Path | None = None,
    tasks_from: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | Literal["auto"] = 4,
    output: str | Path | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], Any] = lambda text: None,
) -> Report:
    """Measure a checkpoint, and the model it was converted from with the same text and questions.

    Args:
        path: folder or hub name of a converted checkpoint or of any causal LM.
        teacher: model to compare with. Default: `model.name` of the checkpoint's recipe.yaml, which is taken in its
            `model.revision`; False for none.
        tasks: lm-evaluation-harness tasks, and groups of them, such as commonsense or mmlu.
        text: "demo", a file or a hub dataset. Default: the text of the checkpoint's recipe, else "demo".
        split: split of that source. Default: that of the recipe, else "dev".
        lengths: context lengths of the loss. Default: the training length and twice that, at most as many as there are
            learned positions.
        windows: windows of text per length, evenly spaced.
        recall: cases [(facts, tokens in between)], True for the usual ones, False for none.
        recall_items: questions per case.
        branches: also take the losses with each branch of the mixers off.
        divergence: also compare predictions with the teacher's, for which both models are in memory at once.
        probes: further measurements: names of probes, or their `type` and settings (docs/recipes.md, "Probes").
        sample_prompt: a prompt to continue greedily.
        include_path: folder with lm-eval task files of your own.
        tasks_from: folder of questions in JSON lines, each file a task: see `linearize.evals.local_tasks`. All of
            them are asked where `tasks` is empty.
        num_fewshot: examples in the prompts of tasks. Default: each task's own choice.
        limit: examples per lm-eval task.
        batch_size: rows per forward; "auto": tasks take what memory holds, other measurements 4.
        output: JSON file for the report. What is finished is kept beside it meanwhile, so that the same call goes on
            where it was stopped.
        dtype: data type of the weights of both models, such as float32; "auto" is that of the checkpoint at `path`.
        device: where to run. Default: a GPU if there is one.
        trust_remote_code: import mixers of your own that the checkpoint names as `module:Class`, and run code of the
            teacher's repository; see `linearize.load`.
        say: receives what will be measured and how much that is, then what is being measured.

    Raises:
        UserError: when a model, text or task cannot be read, or a setting does not fit.
    """
    name = str(path)
    if output is not None:
        check_report(output)
    if sample_prompt == "":
        raise UserError("sample_prompt is empty; give a text to continue, or none")
    recipe = _recipe(name)
    source_model = recipe.get("model") or {}
    if teacher is None or teacher is True:
        source = source_model.get("name")
        if source is None and (teacher or recipe):
            raise UserError(f"{name} has no recipe.yaml that names its source model; give `teacher` by name")
        teacher = source
    revision = source_model.get("revision") if str(teacher) == source_model.get("name") else None
    data = _training_data(name, recipe)
    told = recipe.get("evaluation") or {}
    device = default_device(device or "auto")
    asked = _config(
        text=text or told.get("text"),
        split=split or told.get("split", "dev"),
        lengths=list(lengths or ()),
        windows=windows,
        recall=recall if isinstance(recall, bool) else list(recall),
        recall_items=recall_items,
        branches=branches,
        divergence=divergence,
        probes=list(probes),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        sample_prompt=sample_prompt,
        batch_size=batch_size,
    )
    check_evaluation(asked, data)
    with held_report(output), local_tasks(tasks_from) as (folders, local):
        if ours := sorted(set(local) & GROUPS.keys()):
            raise UserError(f"{tasks_from}: {ours[0]!r} is the name of a group of the hub's tasks; give it another")
        asked = asked.model_copy(update={"tasks": asked.tasks or local})
        paths = [*folders, *([] if include_path is None else [include_path])]
        if asked.tasks:
            say(f"reading the questions of {', '.join(asked.tasks)}")
        questions = fetch_tasks(
            asked.tasks,
            paths,
            limit,
            num_fewshot=num_fewshot,
            room=lambda: room_of(resolve_model(name), trust_remote_code=trust_remote_code),
        )
        where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        known = load_config(resolve_model(name), **where)
        token_ids = eval_tokens(asked, load_tokenizer(resolve_model(name), **where), data)
        check_text(asked, data, asked.lengths or _lengths(data, known, may_end(known)), len(token_ids))
        model, tokenizer = load(resolve_model(name), dtype=dtype, device=device, **where)
        config = asked.model_copy(update={"lengths": asked.lengths or _lengths(data, model.config, learned(model))})
        check_lengths(model, config.lengths)
        check_text(config, data, config.lengths, len(token_ids))
        _check_vocabulary(name, model, token_ids)
        environment = _environment(model)
        weights = environment["dtype"].removeprefix("torch.")
        vocabulary = tokenizer.get_vocab()

        def load_teacher() -> tuple[Any, Any]:
            options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
            model, tokenizer = load(resolve_model(str(teacher)), dtype=weights, device=device, **options)
            if tokenizer.get_vocab() != vocabulary:
                raise UserError(
                    f"{teacher} and {name} have different tokenizers, their losses per token cannot be compared; "
                    "choose another `teacher` or teacher=False"
                )
            return model, tokenizer

        told_length = config.lengths[0] if data is None else data.seq_len
        settings: dict[str, Any] = {"config": config, "token_ids": token_ids, "seq_len": told_length}

        made_of: dict[str, Any] = {}
        if output is not None:
            folders_of_tasks = [Path(folder) for folder in (tasks_from, include_path) if folder is not None]
            files = [*named_files(config.probes), *(f for folder in folders_of_tasks for f in folder.rglob("*"))]
            made_of = {
                "model": model_made_of(resolve_model(name)),
                "teacher": model_made_of(resolve_model(str(teacher)), revision) if teacher else None,
                "settings": config.model_dump(mode="json", exclude={"batch_size"}),  # which changes no result
                "seq_len": told_length,
                "text": text_made_of(token_ids),
                "files": files_made_of(files),
                "environment": environment,
            }
        parts = Parts(output, made_of, say)
        works = works_on(model, config, told_length, teacher=bool(teacher), questions=questions)
        say(
            "\n  ".join(
                ["to be measured, what fits it on the teacher too:" if teacher else "to be measured:", *summary(works)]
            )
        )

        def take(who: str, model: Any, tokenizer: Any, beside: Any = None) -> Measurement:
            options = {**settings, "include_path": paths, "teacher": beside}
            options["keep"] = lambda part, measured: parts.take(f"{who}: {part}", measured)
            return measure(model, tokenizer, **options, say=lambda what: say(f"measuring {who}: {what}"))

        together = divergence or any(probe_of(probe).needs_teacher for probe in config.probes)
        source = load_teacher() if teacher and together else None
        student_measurement = take("student" if teacher else "model", model, tokenizer, source and source[0])
        del model
        teacher_measurement = take("teacher", *(source or load_teacher())) if teacher else None
        report = Report(
            model=name,
            student=student_measurement,
            teacher_model=str(teacher) if teacher else None,
            teacher=teacher_measurement,
            settings={
                **config.model_dump(mode="json"),
                "text": config.text or (data.source if data else "demo"),
                "text_tokens": len(token_ids),
            },
            environment=environment,
        )
        if output is not None:
            report.to_json(output)
            parts.remove()
    return report


def _recipe(name: str) -> dict[str, Any]:
    """The recipe.yaml that lies beside a converted checkpoint's weights; empty for other models."""
    if Path(name).is_dir():
        recipe = recipe_in(Path(name)) or {}
    else:
        found = hub_file(name, "recipe.yaml") if "/" in name else None
        recipe = read_mapping(found) if found else {}
    for key in ("model", "data", "evaluation"):
        if not isinstance(recipe.get(key) or {}, dict):
            raise UserError(f"recipe.yaml of {name} is damaged: {key} must hold keys, got {recipe[key]!r}")
    return recipe


def _training_data(name: str, recipe: Mapping[str, Any]) -> DataConfig | None:
    try:
        return DataConfig.model_validate(recipe["data"]) if recipe.get("data") else None
    except ValidationError as error:
        raise user_error(error, f"recipe.yaml of {name}: data", DataConfig.model_fields) from None


def _check_vocabulary(name: str, model: Any, token_ids: torch.Tensor) -> None:
    known = model.get_input_embeddings().weight.shape[0]
    if len(token_ids) and (largest := int(token_ids.max())) >= known:
        raise UserError(
            f"the tokenizer of {name} writes token {largest}, and the model knows {known}; they do not belong together"
        )


def _config(**values: Any) -> EvalConfig:
    try:
        return EvalConfig.model_validate(values)
    except ValidationError as error:
        raise user_error(error, "", EvalConfig.model_fields) from None


def _lengths(data: DataConfig | None, config: Any, limit: int | None) -> list[int]:
    """The training length and twice that, up to the `limit` of a table of positions; without a recipe, one length."""
    if data is None:
        return [min(DEFAULT_LENGTH, getattr(config.get_text_config(), "max_position_embeddings", DEFAULT_LENGTH))]
    limit = limit or 2 * data.seq_len
    return list(dict.fromkeys(min(length, limit) for length in (data.seq_len, 2 * data.seq_len)))


def _environment(model: Any) -> dict[str, str]:
    packages = (linearize, torch, transformers)
    return {
        **{package.__name__: str(package.__version__) for package in packages},
        "python": platform.python_version(),
        "device": str(model.device),
        "dtype": str(model.dtype),
    }
