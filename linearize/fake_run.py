"""Mixers run on tensors without values, to read off what is known before any weight is there: the size of a state, and
which parameters reach the output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from linearize.mixers.base import Context, HeadShape, Mixer, State, build_mixer


@contextmanager
def without_values(dtype: torch.dtype) -> Iterator[None]:
    """Inside the context tensors have no values, and `dtype` by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(before)


def on_torch(settings: Any) -> Any:
    """The same settings of a mixer without kernels, which need a machine that has them."""
    return dataclasses.replace(settings, backend="torch") if hasattr(settings, "backend") else settings


def two_tokens(mixer: Mixer, shape: HeadShape, dtype: torch.dtype) -> tuple[torch.Tensor, State]:
    """What the mixer returns for a sequence of two tokens."""
    q = torch.empty(1, 2, shape.heads, shape.key_dim, dtype=dtype)
    k = torch.empty(1, 2, shape.kv_heads, shape.key_dim, dtype=dtype)
    v = torch.empty(1, 2, shape.kv_heads, shape.value_dim, dtype=dtype)
    x = torch.empty(1, 2, shape.hidden_size, dtype=dtype)
    return mixer(q, k, v, x, Context(lambda q, k: (q, k)))


def state_bytes(mixer: Mixer, shape: HeadShape, dtype: torch.dtype) -> int:
    """Bytes of the mixer's decoding state for one sequence, read off a forward pass."""
    _, state = two_tokens(mixer, shape, dtype)
    return sum(t.numel() * t.element_size() for t in tree_leaves(state) if isinstance(t, torch.Tensor))


def idle_without(mixer: Mixer, branch: str) -> set[str]:
    """Names of the mixer's parameters that get no gradient while this branch is switched off."""
    with without_values(torch.float32):
        twin = build_mixer(type(mixer), on_torch(mixer.config), mixer.shape)
        own = dict(twin.named_parameters())
        with torch.enable_grad(), twin.without(frozenset({branch})):
            y, _ = two_tokens(twin, mixer.shape, torch.float32)
        if not y.requires_grad:
            return set(own)
        found = torch.autograd.grad(y.sum(), list(own.values()), allow_unused=True)
    return {name for name, gradient in zip(own, found, strict=True) if gradient is None}
