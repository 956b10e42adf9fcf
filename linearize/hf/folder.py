"""What lies in a checkpoint's folder, read without torch: `check_folder`, `weight_files`, `check_weights`.

Loading, merging and pushing all begin here, so a folder that is no finished checkpoint is the same error everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from linearize import plain_yaml
from linearize.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter"
"""Name of the folder inside a checkpoint that holds a LoRA in PEFT's format."""


def check_folder(folder: Path) -> None:
    """Raise a UserError for what is no folder with a configuration, or has one that is no JSON object."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; give a checkpoint's folder, or a hub repository such as org/name")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json, so it is not a finished Hugging Face checkpoint")
    for file in filter(Path.is_file, (folder / "config.json", folder / "generation_config.json")):
        try:
            found = json.loads(read_text(file))
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            continue  # transformers says what it is, or goes on without it
        if not isinstance(found, dict):
            shown = str(found)[:40]
            raise UserError(f"{file} is damaged: it holds no JSON object but {shown!r}; copy or download it again")


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that hold a checkpoint's weights."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        try:
            return sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / INDEX} is damaged ({error!r}); export or download the checkpoint again"
            ) from error
    hint = "it holds pickled weights (.bin), which are never read; convert them to safetensors first"
    if not any(folder.glob("*.bin")):
        hint = "convert or download it again"
    raise UserError(f"{folder} has a config.json but no weights ({SINGLE} or {INDEX}); {hint}")


def check_weights(file: Path) -> None:
    """Read the header, which tells the size that the file must have."""
    try:
        with safe_open(file, framework="numpy"):  # which spares importing torch
            pass
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing; {INDEX} names it. Copy the checkpoint again") from error
    except SafetensorError as error:
        raise UserError(
            f"{file} is damaged ({error}); it was probably cut off while being copied or downloaded. "
            "Delete it and fetch or convert the checkpoint again"
        ) from error


def recipe_in(folder: Path) -> dict[str, Any] | None:
    """The recipe.yaml beside a checkpoint's weights, as plain data; None where there is none.

    Raises:
        UserError: for a file that is empty, damaged or no mapping.
    """
    path = folder / "recipe.yaml"
    return read_mapping(path) if path.is_file() else None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file of a checkpoint.

    Raises:
        UserError: for a file that is empty, damaged or no mapping.
    """
    try:
        found = plain_yaml.read(read_text(path))
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise _no_recipe(path, f"is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict):
        raise _no_recipe(path, "is empty" if found is None else f"holds no recipe but a {type(found).__name__}")
    return found


def _no_recipe(path: Path, what: str) -> UserError:
    inside = path.parent.name == "run"  # a conversion writes its recipe there first, and beside the weights at the end
    other = path.parent.parent / path.name if inside else path.parent / "run" / path.name
    remedy = f"copy {other} over it" if other.is_file() else "restore it, or convert into another folder"
    return UserError(f"{path} {what}; {remedy}" + ("" if inside else ", or remove it"))


def read_text(path: Path) -> str:
    """A text file of a checkpoint, without a byte order mark.

    Raises:
        UserError: for one that is not UTF-8, or cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not UTF-8 (line {line}); save it as UTF-8, or remove it") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); see to its permissions, or remove it") from error


def is_bundled(path: Path) -> bool:
    """Whether a Python file was written by an export, as its first line says."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().startswith(("# Written by linearize ", "# Copied from "))


def is_of(report: Mapping[str, Any], folder: Path) -> bool:
    """Whether a report of `linearize evaluate` is about the model in `folder`, by the name that was evaluated; folders
    may have been moved since.
    """
    return Path(str(report.get("model", ""))).name == folder.resolve().name
