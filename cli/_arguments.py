"""Argument types and groups that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

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
