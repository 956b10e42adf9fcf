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
    return wanted
