"""What lies in a checkpoint's folder, read without torch: `check_folder`, `weight_files`, `check_weights`.

Loading, merging and pushing all begin here, so a folder that is no finished checkpoint is the same error everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from linearize.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter"
"""Name of the folder inside a checkpoint that holds a LoRA in PEFT's format."""


def check_folder(folder: Path) -> None:
    """Raise a UserError for what is no folder with a configuration."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; give a checkpoint's folder, or a hub repository such as org/name")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json, so it is not a finished Hugging Face checkpoint")


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that hold a checkpoint's weights."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        return sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
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


def is_bundled(path: Path) -> bool:
    """Whether a Python file was written by an export, as its first line says."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().startswith(("# Written by linearize ", "# Copied from "))


def is_of(report: Mapping[str, Any], folder: Path) -> bool:
    """Whether a report of `linearize evaluate` is about the model in `folder`, by the name that was evaluated; folders
    may have been moved since.
    """
    return Path(str(report.get("model", ""))).name == folder.resolve().name
