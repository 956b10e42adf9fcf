"""The one place that chooses which code runs an operator: torch, the fla kernels or the naive loop.

Operators call `choose` with the user's wish; `auto` takes fla on CUDA when it can run there and torch
otherwise, and says so once in the log. On CPU neither triton nor fla is ever imported.
"""

import functools
import importlib
import importlib.util
import logging
import re
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "fla", "naive")


@functools.lru_cache(maxsize=1)
def _missing_packages() -> str:
    """Names of the packages the fla kernels need and that are not installed, or an empty string."""
    return ", ".join(name for name in ("triton", "fla") if importlib.util.find_spec(name) is None)


@functools.cache
def _log_once(op: str, chosen: str, reason: str) -> None:
    logger.info("%s: backend auto -> %s (%s)", op, chosen, reason)


@functools.cache
def _broken_gate_backward() -> bool:
    """Whether fla refuses gradients of scalar gates: triton 3.4 - 3.7.0 miscompiles them on Hopper (fla 640)."""
    if torch.cuda.get_device_capability()[0] != 9 or importlib.util.find_spec("tilelang") is not None:
        return False
    try:
        import triton
    except ImportError:
        return False
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])
    if broken := (3, 4, 0) <= version < (3, 7, 1):
        logger.info(
            "triton %s miscompiles gradients of fla's decays per head on Hopper GPUs, so they run as equal decays per "
            "channel, which takes more memory; triton 3.7.1 does not",
            triton.__version__,
        )
    return broken


def kernel_gate(g: torch.Tensor, k: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """The gate that fla's kernels get for a log-decay per head `[B, T, H]`: itself, or the same per channel of k.

    The kernels with a decay per channel give right gradients where those with one per head give none.
    """
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (g, k, *others))
    if trains and _broken_gate_backward():
        return g.unsqueeze(-1).expand(*g.shape, k.shape[-1]).contiguous()
    return g


def _obstacle(tensor: torch.Tensor, unsupported: str) -> str:
    """Why the fla kernel cannot run on `tensor`, or an empty string when it can."""
    if not tensor.is_cuda:
        return f"the fla kernels need a CUDA tensor, this one is on {tensor.device.type}"
    if tensor.dtype == torch.float64:
        return "the fla kernels have no float64"
    if unsupported:
        return unsupported
    missing = _missing_packages()
    return f"{missing} not installed" if missing else ""


def fla_kernel(op: str, folder: str, name: str) -> Callable[..., Any]:
    """The function `name` of `fla.ops.<folder>`, imported only now; errors as `fla_function`."""
    return fla_function(op, f"fla.ops.{folder}", name)


def fla_function(op: str, module: str, name: str) -> Callable[..., Any]:
    """The function `name` of a module of fla, imported only now.

    Raises ValueError when fla cannot be imported here.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"{op}: the fla kernels cannot be imported ({error}); use backend 'torch'") from error


def choose(op: str, backend: str, tensor: torch.Tensor, unsupported: str = "") -> str:
    """The backend to run: "torch", "fla" or "naive".

    `tensor` is the input that gives device and dtype; `unsupported` says why the operator's fla kernel cannot
    take these arguments (empty when it can). Raises ValueError for an unknown backend and for an explicit
    "fla" that cannot be met; only "auto" falls back.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r} for {op}; known: {', '.join(BACKENDS)}")
    if backend in ("torch", "naive"):
        return backend
    obstacle = _obstacle(tensor, unsupported)
    if backend == "fla":
        if obstacle:
            raise ValueError(f"{op}: backend 'fla' cannot be used: {obstacle}; use backend 'auto' or 'torch'")
        return "fla"
    chosen = "torch" if obstacle else "fla"
    if not torch.compiler.is_compiling():
        _log_once(op, chosen, obstacle or "CUDA tensor, fla installed")
    return chosen
