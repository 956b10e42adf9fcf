"""Several processes, one conversion: torchrun starts the same command once per device and sets `RANK`.

Every process computes the same thing except for its share of each training step; only the main one writes files.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from accelerate import PartialState


def is_main() -> bool:
    """Whether this process writes the files; known before any process group exists."""
    return rank() == 0


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this process is, from 0."""
    return int(os.environ.get("RANK", 0))


def join(device: torch.device) -> None:
    """Join the processes that torchrun started, as the training loop does: over gloo for a model on CPUs."""
    if processes() > 1:
        PartialState(cpu=device.type == "cpu")


def summed(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes; the tensor itself when there is one process."""
    if processes() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def wait_for_all() -> None:
    """Return when every process has come here, so that none goes on to read what the main one still writes."""
    if dist.is_initialized():
        dist.barrier()
