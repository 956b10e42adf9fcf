"""The whole story of a conversion: recipe -> plan -> swap -> stages -> checkpoint -> measurements.

`convert(recipe, out)` leaves a Hugging Face checkpoint in `out` and everything it did in `out/run`: the resolved
recipe, each stage's metrics and result, and the measurements. Killed at any time, it resumes. Under torchrun all
processes train and the main one writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from linearize.data import model_inputs, prepare
from linearize.device import default_device
from linearize.errors import UserError, write_whole
from linearize.evals.fewshot import room_of
from linearize.evals.lm_harness import fetch_tasks
from linearize.evals.points import Points
from linearize.evals.table import comparison_table
from linearize.families.base import Family
from linearize.hf.auto import linearized
from linearize.hf.export import export, export_adapter
from linearize.hf.load import load, load_processor, load_tokenizer
from linearize.hf.native import native_model
from linearize.hub.card import model_card
from linearize.hub.licence import licence_files
from linearize.inits.calibrated import calibrate
from linearize.origins import (
    check_calibration,
    check_rows,
    check_source_model,
    note_calibration,
    note_source_model,
)
from linearize.plan import Plan, make_plan
from linearize.preflight import check_sources, is_taught, outline, plan_of, stages_of
from linearize.recipe import Recipe
from linearize.registry import family_of, find
from linearize.report.conversions import facts_of
from linearize.resume import (
    adopt,
    alone,
    claim,
    is_exported,
    point_names,
    stage_folder,
)
from linearize.stages.base import Stage
from linearize.swap import swapped, teacher_path
from linearize.training.processes import is_main, join, wait_for_all


def convert(recipe: Recipe, out: str | Path | None = None, *, resume: bool = False, say: Callable = print) -> Path:
    """Convert a model as `recipe` says.

    Args:
        recipe: a validated recipe.
        out: folder for the checkpoint. Default: `<model>-<recipe>` in the current folder, or `<model>-<mixer>` for a
            recipe that does not ship.
        resume: go on with an interrupted conversion in `out`, of the same recipe but for what
            `linearize.resume.claim` lets change.
        say: receives the plan, what is being measured, and the final table, a text each.

    Returns:
        `out`.

    Raises:
        UserError: for everything a recipe, a model or a machine can do wrong; nothing on disk is lost.
    """
    out = Path(
        out if out is not None else f"{Path(recipe.model.name).name}-{recipe.origin.stem or recipe.mixer['type']}"
    )
    plan = plan_of(recipe)
    check_sources(recipe)
    if recipe.evaluation is not None:
        fetch_tasks(
            recipe.evaluation.tasks,
            num_fewshot=recipe.evaluation.num_fewshot,
            room=lambda: room_of(plan.source, **_where(recipe)),
        )
    device = default_device(recipe.model.device)
    if plan.mixer.get("backend") == "fla" and not device.startswith("cuda"):
        raise UserError(f"mixer.backend: fla needs a CUDA GPU, and the device is {device}; take auto or torch")
    if not is_main():
        return _convert(recipe, plan, out, resume, _nothing)
    if resume and not (out / "run" / "recipe.yaml").exists():
        say(f"nothing to resume in {out}, so this is a new conversion")
    with alone(out):
        claim(out, recipe, resume)
        if resume:
            adopt(out, recipe, say)
        return _convert(recipe, plan, out, resume, say)


def _convert(recipe: Recipe, plan: Plan, out: Path, resume: bool, say: Callable) -> Path:
    say(outline(recipe, plan) if plan.chooser is None else plan.before_choice())
    if is_main():
        (out / "run" / "plan.json").write_text(json.dumps(facts_of(plan), indent=1) + "\n")
    where = _where(recipe)
    text_only = find("families", plan.family, Family).auto_class == Family.auto_class
    processor = None if text_only else load_processor(plan.source, **where)
    points = Points(out / "run" / "measurements.json", recipe, load_tokenizer(plan.source, **where), say)
    points.read()
    model, tokenizer = load(
        plan.source,
        dtype=recipe.model.dtype,
        device=default_device(recipe.model.device),
        attn_implementation=recipe.model.attn_implementation,
        **where,
    )
    stages = stages_of(recipe.stages, family_of(model.config))
    data = [
        prepare(recipe.stage_data(s), tokenizer) if stage.trains else None
        for s, stage in zip(recipe.stages, stages, strict=True)
    ]
    folders = [stage_folder(out, i, stage.config.type) for i, stage in enumerate(stages)]
    trained = resume and all(map(Stage.finished, folders))
    if resume and is_main() and not trained:
        for stage, rows, folder in zip(stages, data, folders, strict=True):
            check_rows(stage, rows, folder)
    if is_main():
        if resume and not (trained and is_exported(out, recipe)):
            check_source_model(out, model, recipe.model.name)
        note_source_model(out, model)
    if plan.chooser is not None:
        recipe = chosen(recipe, model, tokenizer, out / "run" / "layers.json")
        plan = make_plan(recipe, model.config)
        say(outline(recipe, plan))
        if is_main():
            (out / "run" / "plan.json").write_text(json.dumps(facts_of(plan), indent=1) + "\n")
    batches = calibration_batches(recipe, tokenizer) if recipe.init.type == "calibrated" else []
    if resume and is_main() and batches and not (trained and is_exported(out, recipe)):
        check_calibration(out, batches, recipe.data.source)
    swap(model, plan, recipe.seed)
    if plan.native is not None:
        native_model(model)  # what its check refuses should not wait until after the training
    measured = set(points.taken)
    with teacher_path(model):
        points.take("teacher", model)
    points.take("untrained", model, between=bool(batches or stages))
    if batches:
        calibrate(model, batches)
        if is_main():
            note_calibration(out, batches)
        points.take("calibrated", model, between=bool(stages))
    labels = point_names([stage.config.type for stage in stages])
    for index, (stage, rows, label) in enumerate(zip(stages, data, labels, strict=True)):
        seconds = stage.run(
            model, rows, folders[index], resume=resume, keep_source=is_taught(recipe, stages[index + 1 :])
        )
        points.add_training(0 if rows is None else stage.config.trained_tokens(rows.item_tokens), seconds)
        points.take(label, model, between=index + 1 < len(stages))
    complete = trained and points.taken.keys() == measured and is_exported(out, recipe)
    if is_main() and not complete:
        files: dict[str, str | bytes] = {**licence_files(plan.source)}
        files |= {"recipe.yaml": recipe.to_yaml(), "README.md": model_card(recipe, plan, points.taken)}
        options: dict[str, Any] = {"max_shard_size": recipe.export.max_shard_size, "extra_files": files}
        if stages and stages[-1].adapter is not None:
            export_adapter(stages[-1].adapter, processor or tokenizer, out, **options)
        else:
            export(model, processor or tokenizer, out, native=plan.native is not None, **options)
    wait_for_all()
    if points.taken:
        say(comparison_table(list(points.taken.items())))
    say(f"the checkpoint in {out} is complete, and was left as it is" if complete else f"checkpoint written to {out}")
    return out


def _where(recipe: Recipe) -> dict[str, Any]:
    """Options of what reads the source model."""
    return {"trust_remote_code": recipe.model.trust_remote_code, "revision": recipe.model.revision}


def chosen(recipe: Recipe, model: Any, tokenizer: Any, place: Path) -> Recipe:
    """The recipe with the layers that its selector chooses on this source model, or chose before, as `place` says."""
    selector = recipe.selector(family_of(model.config))
    assert selector is not None
    join(model.device)
    if is_main() and not place.exists():
        choice = selector.choose(model, tokenizer, prepare(recipe.source_data(), tokenizer))
        write_whole(place, json.dumps(choice.to_dict(), indent=1) + "\n")
    wait_for_all()
    kept = json.loads(place.read_text())["kept"]
    depth = model.config.get_text_config().num_hidden_layers
    return recipe.model_copy(update={"layers": [i for i in range(depth) if i not in kept]})


def swap(model: Any, plan: Plan, seed: int) -> None:
    """Put the plan's mixers into a source model, in place, and fill their parameters."""
    linearized(model, plan.description())
    for name, attn in swapped(model).items():
        attn.mixer.initialise(f"{name}.mixer", seed)


def calibration_batches(recipe: Recipe, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """The first rows of the training data, on which gates and output sizes are set from the teacher."""
    rows = prepare(recipe.source_data(), tokenizer)
    count = min(max(1, recipe.init.tokens // rows.seq_len), len(rows))
    return [model_inputs(rows.batch([i])) for i in range(count)]


def _nothing(text: str) -> None:
    """What the processes besides the main one say."""
