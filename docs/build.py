"""Writes docs/recipes.md, the reference of all recipe settings, from the schema itself; `make docs` runs it.

Mixers and stages are found as recipes find them, so a new file of either appears without a change here.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from linearize.data import DataConfig
from linearize.evals.config import EvalConfig
from linearize.evals.probe_groups import GROUPS
from linearize.evals.probes.base import Probe
from linearize.inits.calibrated import InitConfig
from linearize.mixers.base import Mixer
from linearize.mixers.composed import ComposedConfig
from linearize.mixers.parts.base import Part
from linearize.mixers.parts.conv import ConvConfig
from linearize.mixers.parts.output import OutputConfig
from linearize.model_names import ALIASES
from linearize.recipe import Recipe
from linearize.recipe_files import available
from linearize.recipe_sections import ExportConfig, KeptConfig, ModelConfig
from linearize.registry import find, keys
from linearize.schema import parse_count
from linearize.select.base import Selector, SelectorConfig
from linearize.stages.base import Stage
from linearize.training.config import TrainingConfig

PAGE = Path(__file__).parent / "recipes.md"
Row = tuple[str, str, str, str]

HEAD = """\
<!-- Written by docs/build.py from the schema; run `make docs` instead of editing it. -->
# Recipes

A recipe is a YAML file that says everything a conversion does. `linearize convert --model NAME --recipe NAME`
takes a shipped one, `--recipe mine.yaml` your own, and `key=value` arguments change single settings:
`mixer.window=128`, `stages.0.tokens=2M`, `stages.*.lr=1e-4` (every stage), `layers=LLLS`. A key that does not exist
is an error that names the closest one. Values, here and in files, are read as YAML 1.2 has them: `1e-4` and `010` are
numbers (0.0001 and 10), only `true` and `false` are booleans, and `1:30`, `no` and `2024-01-01` are text.
`extends: demo/lolcats` starts from another recipe and changes what follows.
The resolved recipe, with every default filled in, is written into the checkpoint as `recipe.yaml`; it
reproduces the run.

A *count* is a whole number that may have a unit: `20M`, `500k`, `1.5B` (k is 1,000).
"""


PARTS = """\
A part is written as its name, `decay: scalar`, or with settings, `decay: {type: low_rank, rank: 32}`; settings without
a `type` change the mixer's own default. `module:Class` names one of your own.
"""
PART_KINDS = {"feature_maps": "feature_map", "decays": "decay", "updates": "update", "combines": "combine"}


def find_kind(package: str) -> str:
    """Heading of a kind of parts: the key that recipes write it under."""
    return f"`{PART_KINDS[package]}`"


def render() -> str:
    """The whole page."""
    parts = [HEAD, "## Shipped recipes\n", _shipped()]
    parts += ["## Top level\n", _table(_model_rows(Recipe))]
    sections = {
        "model": ModelConfig,
        "kept": KeptConfig,
        "data": DataConfig,
        "evaluation": EvalConfig,
        "init": InitConfig,
        "export": ExportConfig,
    }
    for name, section in sections.items():
        parts += [f"## `{name}`\n", f"{_summary(section)}\n", _table(_model_rows(section))]
    parts += [
        "## `mixer`\n",
        "`type` names the mixer, `module:Class` one of your own: see [adding a mixer](adding_a_mixer.md).\n",
    ]
    for key in sorted(keys("mixers"), key=lambda key: (key != "composed", key)):
        mixer = find("mixers", key, Mixer)  # type: ignore[type-abstract]
        module = inspect.getmodule(mixer)
        parts += [f"### `{key}`\n", f"{inspect.getdoc(module)}\n"]
        is_preset = issubclass(mixer.Config, ComposedConfig) and mixer.Config is not ComposedConfig
        if is_preset:
            parts += ["The settings of `composed`, with these defaults:\n", _preset(mixer.Config)]
        else:
            parts += [_table(_dataclass_rows(mixer.Config))]
    parts += ["## Parts of a mixer\n", PARTS]
    for package in PART_KINDS:
        parts += [f"### {find_kind(package)}\n"]
        for key in keys(f"mixers.parts.{package}"):
            part = find(f"mixers.parts.{package}", key, Part)
            rows = [row for row in _dataclass_rows(part.Config) if row[0] != "type"]
            parts += [f"#### `{key}`\n", f"{inspect.getdoc(inspect.getmodule(part))}\n", _table(rows) if rows else ""]
    parts += [
        "## Selectors of layers\n",
        "`layers: {type: ...}` leaves the choice to one of these. All have these settings:\n",
        _table(_model_rows(SelectorConfig)),
    ]
    for key in keys("select"):
        selector = find("select", key, Selector)
        parts += [f"### `{key}`\n", f"{inspect.getdoc(inspect.getmodule(selector))}\n"]
        parts += ["Its own settings:\n", _table(_own_rows(selector.Config))]
    groups = "; ".join(f"`{name}` is {', '.join(f'`{probe}`' for probe in probes)}" for name, probes in GROUPS.items())
    parts += [
        "## Probes\n",
        "`evaluation: {probes: [...]}` and `linearize evaluate --probes` take further measurements, by name or as "
        "`{type: name, ...}` with settings; on the command line `--probes 'mqar(pairs=8, lengths=[512, 1k])'`. "
        f"Groups of them: {groups}.\n",
    ]
    for key in keys("evals.probes"):
        probe = find("evals.probes", key, Probe)
        parts += [f"### `{key}`\n", f"{inspect.getdoc(inspect.getmodule(probe))}\n"]
        if rows := _own_rows(probe.Config):
            parts += [_table(rows)]
    parts += [
        "## `stages`\n",
        "A list, run in order. `type` names the stage. All stages that train have these settings:\n",
    ]
    parts += [_table(_model_rows(TrainingConfig))]
    for key in keys("stages"):
        stage = find("stages", key, Stage)
        parts += [f"### `{key}`\n", f"{inspect.getdoc(inspect.getmodule(stage))}\n"]
        if rows := _own_rows(stage.Config):
            parts += ["Its own settings, and defaults that differ:\n", _table(rows)]
        elif not stage.trains:
            parts += ["It does not train and has no settings.\n"]
    parts += ["## Model aliases\n", "Besides hub names and local folders, `model.name` takes `demo` and:\n"]
    parts += ["| alias | hub name |\n|---|---|\n" + "".join(f"| `{a}` | `{h}` |\n" for a, h in ALIASES.items())]
    return "\n".join(parts)


def _shipped() -> str:
    lines = [
        f"| `{name}` | {path.read_text().partition(chr(10))[0].lstrip('# ')} |" for name, path in available().items()
    ]
    return "\n".join(["| name | what it is |", "|---|---|", *lines]) + "\n"


def _table(rows: Iterable[Row]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{key}` | {kind} | {default} | {meaning} |" for key, kind, default, meaning in rows]
    return "\n".join(lines) + "\n"


def _model_rows(model: type[BaseModel], prefix: str = "") -> list[Row]:
    rows: list[Row] = []
    for name, field in model.model_fields.items():
        rows.append((prefix + name, _type(field.annotation, field), _default(field), _escape(_meaning(field))))
        nested = [a for a in (field.annotation, *get_args(field.annotation)) if _is_model(a)]
        if nested and model is not Recipe:
            rows += _model_rows(nested[0], f"{prefix}{name}.")
    return rows


def _meaning(field: FieldInfo) -> str:
    if field.description is None and _is_model(field.annotation):
        return _summary(field.annotation)
    return field.description or ""


def _own_rows(config: type[BaseModel]) -> list[Row]:
    shared = {row for base in (TrainingConfig, SelectorConfig) if issubclass(config, base) for row in _model_rows(base)}
    return [row for row in _model_rows(config) if row not in shared and row[0] != "type"]


def _dataclass_rows(config: type, prefix: str = "") -> list[Row]:
    told, hints = _attribute_docs(config), get_type_hints(config)
    rows: list[Row] = []
    for field in dataclasses.fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if "part" in field.metadata:
            rows.append((prefix + field.name, "part", f"`{default.type}`", _escape(told.get(field.name, ""))))
            continue
        if dataclasses.is_dataclass(default):
            rows += _dataclass_rows(type(default), f"{prefix}{field.name}.")
            continue
        rows.append(
            (
                prefix + field.name,
                _type(hints[field.name]),
                _value(field.default),
                _escape(told.get(field.name, "")),
            )
        )
    return rows


def _preset(config: type) -> str:
    """The defaults in which a preset differs from the composed mixer, as a recipe would write them."""
    mine, base = dataclasses.asdict(config()), dataclasses.asdict(ComposedConfig())
    changed = {key: _shortest(value) for key, value in mine.items() if value != base[key]}
    lines = [f"{key}: {_value(value).strip('`')}" for key, value in changed.items()]
    return "```yaml\n" + "\n".join(lines) + "\n```\n"


def _shortest(value: Any) -> Any:
    """A part's settings without those that are its own defaults; a nested config's without those of its class."""
    if not isinstance(value, dict):
        return value
    for package in PART_KINDS:
        if value.get("type") in keys(f"mixers.parts.{package}"):
            part = find(f"mixers.parts.{package}", value["type"], Part)
            if set(value) == {field.name for field in dataclasses.fields(part.Config)}:
                default = dataclasses.asdict(part.Config())
                rest = {k: v for k, v in value.items() if v != default[k]}
                return {"type": value["type"], **rest} if rest else value["type"]
    for nested in (ConvConfig(), OutputConfig()):
        default = dataclasses.asdict(nested)
        if set(value) == set(default):
            return {k: v for k, v in value.items() if v != default[k]}
    return value


def _attribute_docs(cls: type) -> dict[str, str]:
    """The strings written under a class's attributes."""
    tree = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for attribute, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(attribute, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(attribute.target, ast.Name)
            found[attribute.target.id] = " ".join(str(text.value.value).split())
    return found


def _type(annotation: Any, field: FieldInfo | None = None) -> str:
    """What a user writes for a value of this type."""
    marks = list(getattr(annotation, "__metadata__", ())) + (list(field.metadata) if field else [])
    if any(isinstance(mark, BeforeValidator) and mark.func is parse_count for mark in marks):
        return "count"
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument, field if argument is int else None) for argument in arguments)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(_type(argument) for argument in arguments)}]"
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    if origin is dict or _is_model(annotation):
        return "mapping"
    return "null" if annotation is type(None) else str(annotation.__name__)


def _is_model(annotation: Any) -> bool:
    return inspect.isclass(annotation) and issubclass(annotation, BaseModel)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is PydanticUndefined:
        made = field.default_factory()  # type: ignore[call-arg, misc]
        return "its own defaults" if isinstance(made, BaseModel) else _value(made)
    return _value(field.default)


def _value(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    plain = list(value) if isinstance(value, tuple) else value
    return f"`{yaml.safe_dump(plain, default_flow_style=True).removesuffix(chr(10) + '...' + chr(10)).strip()}`"


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(render())
