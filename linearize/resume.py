"""Whose an output folder is, and what a resumed conversion may change: `claim`, `alone` and `adopt`.

That its data and source model are the same is seen to in `linearize.origins`.

A change may touch no result that is on disk: that of a stage without one, and of keys which the schema marks by
`WITHOUT_EFFECT`. A stage whose settings change is started anew, never continued from checkpoints of the others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from linearize.errors import UserError, disk_full, write_whole
from linearize.hf.folder import check_folder, check_weights, read_mapping, weight_files
from linearize.locks import held
from linearize.origins import CALIBRATION, SOURCE
from linearize.recipe import Recipe
from linearize.registry import find
from linearize.schema import differences, without_effect
from linearize.stages.base import Stage

LOCK = ".lock"
"""File in `run` that the process which converts into the folder holds locked."""


def stage_folder(out: Path, index: int, kind: str) -> Path:
    """Where the stage of this number and type keeps metrics, checkpoints and result."""
    return out / "run" / f"{index}-{kind}"


def point_names(types: Sequence[str]) -> list[str]:
    """A name for the measurement after each stage: its type, numbered where a type comes twice."""
    return [f"after {t} {i + 1}" if types.count(t) > 1 else f"after {t}" for i, t in enumerate(types)]


def claim(out: Path, recipe: Recipe, resume: bool) -> None:
    """Make `out/run` this recipe's, or check that it may become that, see `adopt`; to be called inside of `alone`.

    Raises:
        UserError: when `out` holds something else, or when the recipe to resume differs from the one that began in
            something that results on disk come from.
    """
    mark = _mark(out)
    if mark.exists() and resume and not _is_unbegun(out):
        _changes(out, recipe)
        return
    if _is_anothers(out) or not _is_unbegun(out):
        what = "holds a conversion (go on with --resume)" if mark.exists() else "was not made by this command"
        raise UserError(f"output folder {out} {what}; choose another with -o, or remove it")
    try:
        with disk_full(out):
            for name in (CALIBRATION, SOURCE):
                (mark.parent / name).unlink(missing_ok=True)
            write_whole(mark, recipe.to_yaml())
    except OSError as error:
        raise _unwritable(out, error) from error


def adopt(out: Path, recipe: Recipe, say: Callable[[str], Any]) -> None:
    """Make the conversion in `out` that of a changed recipe: stages whose settings changed begin anew.

    Raises:
        UserError: as `claim`.
    """
    changes = _changes(out, recipe)
    then = _types(_read(out))
    now = [stage["type"] for stage in recipe.stages]
    numbers = [n for path in changes if (n := _stage_number(path)) is not None and not _is_without_effect(path, recipe)]
    for folder in (f for i in range(min(numbers, default=len(then)), len(then)) for f in out.glob(f"run/{i}-*")):
        if any(folder.glob("step-*.safetensors")):
            say(f"the settings of stage {folder.name} changed, so it starts anew; its checkpoints are removed")
        shutil.rmtree(folder)
    _rename_points(out / "run" / "measurements.json", dict(zip(point_names(then), point_names(now), strict=False)))
    if changes:
        write_whole(_mark(out), recipe.to_yaml())


def is_exported(out: Path, recipe: Recipe) -> bool:
    """Whether `out` holds the checkpoint of this recipe, all of it."""
    try:
        check_folder(out)
        for name in weight_files(out):
            check_weights(out / name)
        return (out / "recipe.yaml").read_text() == recipe.to_yaml()
    except (OSError, UserError):
        return False


def _changes(out: Path, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Where the recipe that began in `out` differs from this one, all of it allowed.

    Raises:
        UserError: for differences that are not.
    """
    began = _read(out)
    types = _types(began)
    finished = [i for i, kind in enumerate(types) if Stage.finished(stage_folder(out, i, kind))]
    changes = {k: v for k, v in differences(began, recipe.model_dump(mode="json")).items() if not _same_place(*v)}
    refused = {
        path: values
        for path, values in changes.items()
        if not _is_without_effect(path, recipe) and ((n := _stage_number(path)) is None or n in finished)
    }
    if refused:
        unfinished = [f"stages.{i}" for i in range(len(types)) if i not in finished]
        open_to_change = f"{', '.join(unfinished)} without a result yet, and what" if unfinished else "what"
        raise UserError(
            f"cannot resume in {out}: the recipe differs in "
            + ", ".join(f"{k} ({then!r} then, {now!r} now)" for k, (then, now) in list(refused.items())[:5])
            + "; use the first recipe, or another output folder. What may change is "
            + f"{open_to_change} has no effect on results: {', '.join(_names_without_effect(recipe))}"
        )
    return changes


def _mark(out: Path) -> Path:
    return out / "run" / "recipe.yaml"


def _read(out: Path) -> dict[str, Any]:
    return read_mapping(_mark(out))


def _types(recipe: dict[str, Any]) -> list[str]:
    return [stage["type"] for stage in recipe["stages"]]


def _stage_number(path: str) -> int | None:
    head, _, rest = path.partition(".")
    return int(rest.partition(".")[0]) if head == "stages" else None


def _is_without_effect(path: str, recipe: Recipe) -> bool:
    """Whether `path`, such as `stages.0.log_every`, lies at or below a key that the schema marks."""
    section: type[BaseModel] | None = Recipe
    keys = path.split(".")
    number = _stage_number(path)
    if number is not None:
        if number >= len(recipe.stages):
            return False
        section, keys = find("stages", recipe.stages[number]["type"], Stage).Config, keys[2:]
    for key in keys:
        field = section.model_fields.get(key) if section is not None else None
        if field is None:
            return False
        if without_effect(field):
            return True
        section = _section(field.annotation)
    return False


def _names_without_effect(recipe: Recipe) -> list[str]:
    """Keys that the schema marks, as far as this recipe has them."""
    found = []
    for name, field in Recipe.model_fields.items():
        section = _section(field.annotation)
        below = section.model_fields if section is not None and getattr(recipe, name) is not None else {}
        found += [name] if without_effect(field) else [f"{name}.{k}" for k, f in below.items() if without_effect(f)]
    for settings in recipe.stages:
        fields = find("stages", settings["type"], Stage).Config.model_fields
        found += [f"stages.*.{key}" for key, field in fields.items() if without_effect(field)]
    return list(dict.fromkeys(found))


def _section(annotation: Any) -> type[BaseModel] | None:
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _rename_points(place: Path, names: dict[str, str]) -> None:
    """Give measurements that are kept the names that they have among the stages of now."""
    if not place.exists() or all(then == now for then, now in names.items()):
        return
    points = json.loads(place.read_text())
    write_whole(place, json.dumps([(names.get(name, name), values) for name, values in points], indent=1))


def _same_place(then: Any, now: Any) -> bool:
    """Whether both are ways to write one path that exists."""
    if not (isinstance(then, str) and isinstance(now, str)):
        return False
    return Path(then).exists() and Path(now).exists() and Path(then).samefile(now)


def _is_unbegun(out: Path) -> bool:
    """Whether `out` holds nothing but what a conversion leaves that stopped before it trained or measured."""
    names = (LOCK, "plan.json", ".recipe.yaml.partial", "recipe.yaml", CALIBRATION, SOURCE)
    return set(out.rglob("*")) <= {out / "run", *(out / "run" / name for name in names)}


def _is_anothers(out: Path) -> bool:
    """Whether something is at `out` that no conversion made."""
    return out.exists() and not (out.is_dir() and (_mark(out).exists() or _is_unbegun(out)))


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep every other conversion out of `out` as long as the context lasts; a killed process lets go by itself.

    What no conversion made is left as it is, for `claim` to refuse.

    Raises:
        UserError: when another process converts into `out`, or nothing can be written there.
    """
    if _is_anothers(out):
        yield
        return
    try:
        (out / "run").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error
    message = f"output folder {out} is in use by another running conversion; wait for it, or choose another with -o"
    with held(out / "run" / LOCK, message):
        yield


def _unwritable(out: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to output folder {out}: {error.strerror}; choose another with -o")
