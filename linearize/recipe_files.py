"""Recipe files: which ship with the package, how they are found, extended and overridden, before any validation."""

from __future__ import annotations

import copy
import importlib.resources
from pathlib import Path
from typing import Any

import yaml

from linearize import plain_yaml
from linearize.errors import UserError, did_you_mean
from linearize.model_names import ALIASES

YAML = (".yaml", ".yml")


def available() -> dict[str, Path]:
    """Recipes that ship with the package: `<model>/<method>` -> file."""
    root = Path(str(importlib.resources.files("linearize._recipes")))
    return {f"{p.parent.name}/{p.stem}": p for p in sorted(root.glob("*/*.yaml")) if not p.stem.startswith("_")}


def find_recipe(name: str | Path | None, model: str | None) -> Path:
    """The file of a recipe: `name` is a path, `<model>/<method>` or a method, which `model` or all models may have;
    `auto` if there is no name.

    Raises:
        UserError: when there is none.
    """
    if name is not None and str(name).endswith(YAML):
        if not Path(name).is_file():
            raise UserError(f"no recipe file {str(name)!r}; known recipes: {', '.join(available())}")
        return Path(name)
    known = available()
    reverse = {hub: alias for alias, hub in ALIASES.items()}
    owner = reverse.get(model or "", model or "")
    method = str(name) if name is not None else "auto"
    for candidate in (method, f"{owner}/{method}", f"default/{method}"):
        if candidate in known:
            return known[candidate]
    raise UserError(f"unknown recipe {method!r}{did_you_mean(method, [*known, *{k.split('/')[1] for k in known}])}")


def read_recipe(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe with what it `extends` filled in: sections are merged key by key, lists and mixers of another type
    replaced.
    """
    data = _read_yaml(path)
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends must name one recipe, got {parent!r}")
    root = Path(str(importlib.resources.files("linearize._recipes")))
    try:
        candidates = [(path.parent / parent).resolve(), (root / f"{parent}.yaml").resolve()]
        found = next((c for c in candidates if c.is_file()), None)
    except (OSError, ValueError):  # no file can have such a name
        found = None
    if found is None:
        raise UserError(f"{path} extends {parent!r}, which is no recipe{did_you_mean(parent, available())}")
    if found in (path.resolve(), *below):
        raise UserError(f"{path} extends {parent!r}, which extends it in turn")
    return _merged(read_recipe(found, (path.resolve(), *below)), data)


def _merged(base: Any, changes: Any) -> Any:
    if isinstance(base, str) and isinstance(changes, dict):
        base = {"type": base}  # `mixer: gdn` is short for `mixer: {type: gdn}`
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    if changes.get("type", base.get("type")) != base.get("type"):
        return changes
    return {**base, **{k: _merged(base.get(k), v) for k, v in changes.items()}}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = plain_yaml.read(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a mapping of recipe keys, got {type(data).__name__}")
    return data


def override(data: dict[str, Any], text: str) -> None:
    """Set the key that `text`, `key.path=value` with a value in YAML, names in a recipe's data; `*` is every item of a
    list.

    Raises:
        UserError: for a text or a path that does not fit.
    """
    path, equals, given = text.partition("=")
    if not equals or not path:
        remedy = f"give a recipe file as --recipe {text}" if text.endswith(YAML) else "for example stages.0.tokens=20M"
        raise UserError(f"override {text!r} is not key=value, {remedy}")
    try:
        value = plain_yaml.read(given)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(
            f"override {text!r}: the value is not valid YAML: {why}; a text can be quoted: {path}='\"...\"'"
        ) from error
    _set(data, path, value)


def _set(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node: Any = data
    for depth, part in enumerate(parents):
        if part == "*" and isinstance(node, list):
            for i in range(len(node)):
                _set(data, ".".join([*parents[:depth], str(i), *parents[depth + 1 :], last]), copy.deepcopy(value))
            return
        node = _step(node, part, path, create=True)
    if isinstance(node, list):
        _step(node, last, path, create=False)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"override {path!r}: {'.'.join(parents)} is a {type(node).__name__}, it has no keys")


def _step(node: Any, part: str, path: str, create: bool) -> Any:
    if isinstance(node, list):
        if not part.isdecimal() or int(part) >= len(node):
            raise UserError(
                f"override {path!r}: {part!r} is not one of the {len(node)} items, counted from 0; * is all of them"
            )
        return node[int(part)]
    if not isinstance(node, dict):
        raise UserError(f"override {path!r}: {part!r} has no parent to go under")
    if node.get(part) is None and create:
        node[part] = {}
    if isinstance(node[part], str) and create:
        node[part] = {"type": node[part]}
    return node[part]
