"""Resumable training checkpoints: one safetensors file each, written atomically, the last two kept.

A file holds the trained parameters, the optimiser's moments and, in its metadata, everything else the loop needs to go
on as if it had never stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from linearize.errors import UserError, disk_full

_KEEP = 2


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], state: dict) -> None:
    """Write tensors and a JSON-able state to one file, so that either the old or the new file exists, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with disk_full(path.parent):
        try:
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
                temporary,
                {"state": json.dumps(state)},
            )
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    os.replace(temporary, path)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Read what `write_tensors` wrote.

    Raises:
        UserError: when the file is damaged.
    """
    with _damage(path), safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["state"])  # noqa: SIM118


def read_state(path: Path) -> dict:
    """Only the state of what `write_tensors` wrote.

    Raises:
        UserError: when the file is damaged.
    """
    with _damage(path), safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["state"])


def newest_checkpoint(folder: Path) -> Path | None:
    """The file that `load_checkpoint` reads, if there is one."""
    return max(folder.glob("step-*.safetensors"), default=None)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"checkpoint {path} is damaged ({error}); delete that file and resume again: an earlier checkpoint or the "
            "start of the stage is used instead"
        ) from error


def other_version(path: Path | None, what: object) -> UserError:
    """The error for a checkpoint that holds other things than this version writes."""
    return UserError(
        f"checkpoint {path} was written by another version of linearize ({what}); resume with that version, or delete "
        "the step-*.safetensors beside it, and the stage begins anew"
    )


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimiser steps lies."""
    return folder / f"step-{step:08d}.safetensors"


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict,
    average: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the checkpoint after `step` optimiser steps and remove all but the last two."""
    tensors = {f"parameter/{name}": p for name, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    tensors |= {f"average/{name}": value for name, value in (average or {}).items()}
    write_tensors(checkpoint_path(folder, step), tensors, {**state, "step": step})
    for old in sorted(folder.glob("step-*.safetensors"))[:-_KEEP]:
        old.unlink()


def remove_checkpoints(folder: Path) -> None:
    """Remove what `save_checkpoint` wrote, once the stage's result is on disk."""
    for path in folder.glob("step-*.safetensors"):
        path.unlink(missing_ok=True)


def load_checkpoint(
    folder: Path,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, torch.Tensor] | None = None,
) -> dict | None:
    """Put the newest checkpoint's values into the parameters, the optimiser and the average, if there is one.

    Returns its state, None without a checkpoint.

    Raises:
        UserError: when the newest checkpoint is damaged, belongs to other parameters or is of another version.
    """
    newest = newest_checkpoint(folder)
    if newest is None:
        return None
    tensors, state = read_tensors(newest)
    saved = {name.removeprefix("parameter/") for name in tensors if name.startswith("parameter/")}
    if saved != set(parameters):
        raise UserError(
            f"checkpoint {newest} holds other parameters than this stage trains "
            f"(for example {sorted(saved ^ set(parameters))[0]!r}); resume with the recipe that wrote it"
        )
    if lost := [name for name in average or {} if f"average/{name}" not in tensors]:
        raise other_version(newest, f"no average of {lost[0]}")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"parameter/{name}"])
        for name, value in (average or {}).items():
            value.copy_(tensors[f"average/{name}"])
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, slot, name = key.split("/", 2)
            p = parameters[name]
            optimizer.state[p][slot] = value if slot == "step" else value.to(p.device)
    return state
