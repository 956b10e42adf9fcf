"""Argument types and groups that several commands share."""

from __future__ import annotations

import argparse
import ast
import importlib.util
from importlib.abc import SourceLoader
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from linearize.recipe import Recipe


def numbers(text: str) -> list[int]:
    """`512,2048` -> [512, 2048]."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError(text)
    return values


def names(text: str) -> list[str]:
    """`piqa,arc_easy` -> ["piqa", "arc_easy"]."""
    return [part.strip() for part in text.split(",") if part.strip()]


def probes(text: str) -> list[str | dict[str, Any]]:
    """`passkey,mqar(pairs=8, lengths=[512, 1k])` -> ["passkey", {"type": "mqar", "pairs": 8, "lengths": [512, "1k"]}].

    Settings are written as in recipes: the key, an equals sign, and YAML.
    """
    import yaml

    from linearize import plain_yaml

    found: list[str | dict[str, Any]] = []
    for part in _split(text):
        name, bracket, rest = part.partition("(")
        if not bracket:
            found.append(part)
            continue
        settings = [setting.partition("=") for setting in _split(rest.removesuffix(")"))]
        keys = [key.strip() for key, _, _ in settings]
        if not rest.endswith(")") or not all(equals for _, equals, _ in settings) or "type" in keys:
            raise argparse.ArgumentTypeError(f"{part!r} is not a probe; write name or name(key=value, key=value)")
        try:
            found.append({"type": name.strip(), **{key.strip(): plain_yaml.read(value) for key, _, value in settings}})
        except yaml.YAMLError:
            raise argparse.ArgumentTypeError(f"a setting in {part!r} is not YAML, such as 8 or [512, 1k]") from None
    return found


def _split(text: str) -> list[str]:
    """The parts between the commas outside brackets, without empty ones."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def positive(text: str) -> int:
    """A whole number from 1."""
    (value,) = numbers(text)
    return value


def positive_or_auto(text: str) -> int | str:
    """A whole number from 1, or the word auto."""
    return text if text == "auto" else positive(text)


def from_zero(text: str) -> int:
    """A whole number from 0."""
    return 0 if text == "0" else positive(text)


# What argparse calls a type in its messages.
numbers.__name__ = "list of positive numbers"
names.__name__ = "list of names"
positive.__name__ = "positive number"
from_zero.__name__ = "number from 0"
positive_or_auto.__name__ = "positive number or auto"


def take_defaults(parser: argparse.ArgumentParser, module: str, function: str) -> None:
    """Give the arguments the defaults of the function's keywords; read from its source, for an import takes seconds."""
    found = importlib.util.find_spec(module)
    source = found.loader.get_source(module) if found and isinstance(found.loader, SourceLoader) else None
    assert source is not None, module
    nodes = {node.name: node.args for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    pairs = zip(nodes[function].kwonlyargs, nodes[function].kw_defaults, strict=True)
    defaults = {key.arg: ast.literal_eval(value) for key, value in pairs if isinstance(value, ast.Constant | ast.Tuple)}
    parser.set_defaults(**{a.dest: defaults[a.dest] for a in parser._actions if a.dest in defaults})


def add_trust(parser: argparse.ArgumentParser) -> None:
    """`--trust-remote-code`, for commands that load a checkpoint."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="import mixers of your own that the checkpoint names as module:Class, from the Python path",
    )


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that choose a recipe and change it."""
    parser.add_argument("--model", metavar="NAME", help="alias such as llama-3-8b or demo, hub name, or folder")
    parser.add_argument("--recipe", metavar="NAME", help="shipped recipe (default: auto), or path of a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, such as stages.0.tokens=2M"
    )


def load_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe that `add_recipe_arguments` asked for."""
    from linearize.errors import UserError
    from linearize.recipe import Recipe

    if arguments.model is None and arguments.recipe is None:
        raise UserError("which model? give --model NAME (demo needs no download), or a --recipe file that names one")
    return Recipe.load(arguments.recipe, arguments.model, arguments.overrides)


def dtype(name: str) -> torch.dtype:
    """The torch data type called `name`."""
    import torch

    from linearize.errors import UserError

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UserError(f"unknown dtype {name!r}; known: bfloat16, float16, float32")
    return found
