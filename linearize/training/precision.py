"""Compute precision of a stage: bfloat16 under autocast, or float32 throughout, whatever types the weights have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from linearize.swap import source_weights
from linearize.training.config import TrainingConfig

HALVES = (torch.float16, torch.bfloat16)


def precision(config: TrainingConfig, device: torch.device) -> str:
    """What `config` asks for on `device`: bf16 or fp32."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" else "fp32"


def autocast(config: TrainingConfig, device: torch.device) -> Any:
    """The context in which a stage of this `config` computes on `device`."""
    bf16 = precision(config, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def backpropagate(loss: torch.Tensor, gradient: torch.Tensor | None = None) -> None:
    """`loss.backward()` outside of autocast, in which forward products of float32 would have gradients of bfloat16.

    Args:
        loss: a number, or any tensor with its `gradient`.
    """
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward(gradient)


@contextmanager
def float32_weights(model: nn.Module) -> Iterator[None]:
    """Inside the context all half-precision weights of a model, and those kept of its source, are float32.

    Afterwards they have their types again, and those that did not change their bits: float32 holds every half. It takes
    2 bytes a weight more while it lasts. Weights that join the model inside, such as adapters, are left as they are.
    """
    source = source_weights(model)
    halves = [t for t in itertools.chain(model.parameters(), model.buffers()) if t.dtype in HALVES]
    dtypes = [t.dtype for t in halves]
    for t in halves:
        t.data = t.data.float()
    source.match_types()
    try:
        yield
    finally:
        for t, dtype in zip(halves, dtypes, strict=True):
            t.data = t.data.to(dtype)
        source.match_types()
