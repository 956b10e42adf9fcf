"""What is known of a conversion before any weight is there: its plan, what is wrong with its recipe, and its outline.

`plan_of(recipe)` and `check_sources(recipe)` raise what stands in the way; `outline(recipe, plan)` is what `linearize
plan` prints.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from linearize import plain_yaml
from linearize.data import check_source
from linearize.evals.held_out import check_evaluation, held_out
from linearize.evals.workload import summary, workload
from linearize.families.base import Family
from linearize.hf.auto import linearized
from linearize.hf.load import load_config
from linearize.plan import Plan, make_plan
from linearize.recipe import Recipe
from linearize.registry import family_of, find
from linearize.stages.base import Stage
from linearize.training.config import StageConfig, TrainingConfig
from linearize.training.loop import split
from linearize.training.processes import processes

TOLD = {"type", "tokens", "seq_len", "batch_size", "micro_batch_size", "lr", "lora", "data"}
"""Settings of stages that the outline tells in words, or that change nothing of what is learned."""


def plan_of(recipe: Recipe) -> Plan:
    """The plan of a recipe, from its model's configuration alone; no weights are loaded.

    Raises:
        UserError: for all that `make_plan` refuses, and for stages that would find nothing to train.
    """
    source = recipe.model
    config = load_config(recipe.resolved_model(), trust_remote_code=source.trust_remote_code, revision=source.revision)
    plan = make_plan(recipe, config)
    with torch.device("meta"):
        skeleton = family_of(config).model_class(copy.deepcopy(config))
        linearized(skeleton, plan.description())
    stages = stages_of(recipe.stages, family_of(config))
    for index, (stage, settings) in enumerate(zip(stages, recipe.stages, strict=True)):
        stage.keep_source |= is_taught(recipe, stages[index + 1 :])
        if stage.trains:
            split(stage.config, processes())
            stage.check_data(recipe.stage_data(settings, f"stages.{index}"), recipe.data)
        stage.check(skeleton)
    return plan


def check_sources(recipe: Recipe) -> None:
    """Raise the errors of training text and held-out text that can be known before a model is there, from local files
    alone.
    """
    for index, settings in enumerate(recipe.stages):
        if find("stages", settings["type"], Stage).trains:
            check_source(recipe.stage_data(settings, f"stages.{index}"))
    if recipe.init.type == "calibrated" or isinstance(recipe.layers, dict):
        check_source(recipe.source_data())
    if recipe.evaluation is not None:
        check_evaluation(recipe.evaluation, recipe.data)


def outline(recipe: Recipe, plan: Plan) -> str:
    """The plan and what follows it: data, initial values, stages and measurements, a line each."""
    lines = [str(plan), f"data        {recipe.data.source}, sequences of {recipe.data.seq_len:,} tokens"]
    if recipe.init.type == "calibrated":
        lines.append(f"init        gates and output scales set from the teacher on {recipe.init.tokens:,} tokens")
    for stage in recipe.stages:
        config = find("stages", stage["type"], Stage).Config.model_validate(stage)
        lines += [f"stage       {stage['type']}{_training(recipe, stage, config)}", *_choices(config)]
    if recipe.evaluation is not None:
        points = 2 + (len(recipe.stages) + (recipe.init.type == "calibrated")) * recipe.evaluation.between
        asked = workload(recipe.evaluation, recipe.data.seq_len, branches=len(plan.branches), causal=plan.causal)
        size, *works = summary(asked)
        text = held_out(recipe.evaluation, recipe.data)
        where = f"            on {text.source}, split {text.split}"
        lines += [f"measured    {points} times, {size} each", where, *(f"            {work}" for work in works)]
    return "\n".join(lines)


def _training(recipe: Recipe, stage: Mapping[str, Any], config: StageConfig) -> str:
    """What a stage trains on and how: whole steps, which `tokens` is rounded up to."""
    if not isinstance(config, TrainingConfig):
        return ": no training"
    data = recipe.stage_data(stage)
    item = data.seq_len * data.item_rows
    trained, asked = config.trained_tokens(item), f" ({config.tokens:,} asked for)"
    tokens = f"{trained:,} tokens{asked if trained != config.tokens else ''}"
    steps = f"{(n := config.steps(item)):,} step{'s' * (n > 1)} of {config.batch_size} x {item:,}"
    lora = stage.get("lora")
    with_lora = f", LoRA r {lora['r']} on {', '.join(lora['targets'])}" if lora else ""
    on = f", on {data.source}" if data.source != recipe.data.source else ""
    return f": {tokens}, {steps}, lr {stage['lr']:g}{with_lora}{on}"


def _choices(config: StageConfig) -> list[str]:
    """What the recipe settled otherwise than the class of the stage, but for what `_training` tells: a line or none."""
    own = config.model_dump(mode="json", exclude_defaults=True, exclude=TOLD)
    return [f"            {plain_yaml.write_line(own)[1:-1]}"] if own else []


def stages_of(settings: Sequence[Mapping[str, Any]], family: type[Family], *, trusted: bool = True) -> list[Stage]:
    """The stages that `settings` describe, as `Recipe.stages` has them, ready to run on a model of `family`.

    `trusted` is False where the settings come from a checkpoint, see `registry.find`.
    """
    classes = [find("stages", values["type"], Stage, trusted=trusted) for values in settings]
    return [stage(stage.Config.model_validate(values), family) for stage, values in zip(classes, settings, strict=True)]


def is_taught(recipe: Recipe, later: Sequence[Stage]) -> bool:
    """Whether the source model is needed after a stage that these follow."""
    compared = recipe.evaluation is not None and recipe.evaluation.divergence
    return compared or any(stage.needs_teacher for stage in later)
