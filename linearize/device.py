"""Where a model runs."""

from __future__ import annotations

import os

import torch

from linearize.errors import UserError


def default_device(wanted: str) -> str:
    """The device that a name stands for: auto is this process's GPU if there is one, else the CPU.

    Raises:
        UserError: for a name that is no device, or one that this machine does not have.
    """
    if wanted == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(wanted).type
    except RuntimeError as error:
        raise UserError(f"unknown device {wanted!r}; known: auto, cpu, cuda, cuda:0 and so on, mps") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {wanted!r} was asked for, and torch finds no GPU here; take auto or cpu")
    if kind == "meta":
        raise UserError("device 'meta' holds no values, so nothing runs there; take auto, cpu or cuda")
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError, ImportError) as error:  # whatever torch raises for kinds it was built without
        reason = str(error).split(". ")[0].rstrip(".")
        raise UserError(f"device {wanted!r} cannot be used here ({reason}); take auto or cpu") from error
    return wanted
