"""Predictions that are no numbers: noticed while a model runs, and written as what JSON has for them.

A model that broke in training, or overflows in half precision, returns NaN or infinity. A loss says so, but a likeliest
token does not: it is then just the first one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

BROKEN = "predictions of the model are NaN or infinite"
"""Why something was not measured."""


@contextmanager
def watching(*models: Any) -> Iterator[Callable[[], bool]]:
    """`with watching(model) as broken: ...; broken()` says whether the largest logit of any prediction was not finite.

    Logits of -inf beside finite ones, as of tokens that a model never writes, are fine.
    """
    flags: dict[torch.device, torch.Tensor] = {}
    inner = (getattr(model, "get_base_model", lambda: None)() for model in models)  # peft calls its forward directly
    watched = dict.fromkeys(module for module in (*models, *inner) if isinstance(module, nn.Module))
    hooks = [module.register_forward_hook(partial(_look, flags)) for module in watched]
    try:
        yield lambda: any(bool(flag) for flag in flags.values())
    finally:
        for hook in hooks:
            hook.remove()


def _look(flags: dict[torch.device, torch.Tensor], module: nn.Module, args: Any, output: Any) -> None:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or not logits.numel():
        return
    bad = ~logits.detach().amax(-1).isfinite().all()
    before = flags.get(bad.device)
    flags[bad.device] = bad if before is None else before | bad


def nulled(value: Any) -> Any:
    """Plain data with None in place of each number that is not finite."""
    if isinstance(value, dict):
        return {key: nulled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(nulled(item) for item in value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def places(value: Any) -> tuple[int, int]:
    """How many of the numbers with a fraction in plain data are not finite, and how many there are."""
    if isinstance(value, float):
        return int(not math.isfinite(value)), 1
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    counts = [places(child) for child in children]
    return sum(bad for bad, _ in counts), sum(n for _, n in counts)
