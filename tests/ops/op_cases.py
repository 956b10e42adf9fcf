"""Inputs and calls that the tests of the recurrences share: one `Case` per operator, all behind the same
call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from linearize.ops.gla import gla
from linearize.ops.linear import linear_attention
from linearize.ops.simple_gla import simple_gla

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """An operator: `inputs` makes q, k, v (and g), `run` gives (outputs, state), both as lists of tensors."""

    name: str
    decay: str
    op: Callable

    def inputs(self, B: int, T: int, H: int = 2, K: int = 8, V: int = 6, *, groups: int = 1, seed: int = 0) -> Tensors:
        torch.manual_seed(seed)
        q, k, v = torch.randn(B, T, H * groups, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
        if self.decay == "none":
            return [q.softmax(-1), k.softmax(-1), v]
        return [q, k, v, self.log_decay(B, T, H, K, -0.2)]

    def log_decay(self, B: int, T: int, H: int, K: int, strongest: float) -> torch.Tensor:
        """Mostly weak decays, one in ten as strong as `strongest`."""
        shape = (B, T, H) if self.decay == "head" else (B, T, H, K)
        weak = -0.1 * torch.rand(shape)
        return torch.where(torch.rand(shape) < 0.1, strongest, weak)

    def run(self, inputs: Tensors, **options) -> tuple[Tensors, Tensors]:
        if options.get("state") is not None:
            options["state"] = options["state"][0] if len(options["state"]) == 1 else tuple(options["state"])
        *outputs, state = self.op(*inputs, **options)
        return outputs, list(state) if isinstance(state, tuple) else [state]


CASES = [
    Case("linear", "none", linear_attention),
    Case("simple_gla", "head", simple_gla),
    Case("gla", "channel", gla),
]


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of the truth (a truth of zeros asks for exact zeros)."""
    assert x.shape == truth.shape
    difference = (x.double() - truth.double()).abs().max().item()
    return difference / max(truth.double().abs().max().item(), 1e-300) if difference else difference


def assert_close(results: Tensors, truths: Tensors, tolerance: float) -> None:
    assert len(results) == len(truths)
    errors = [relative_error(x, y) for x, y in zip(results, truths, strict=True)]
    assert all(error <= tolerance for error in errors), errors


def gradients(outputs: Tensors, inputs: Tensors) -> Tensors:
    """Gradients of a fixed random functional of the outputs."""
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for x in outputs:
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        loss = loss + (x.cpu().double() * weight).sum()
    return list(torch.autograd.grad(loss, inputs))


def as_leaves(inputs: Tensors, dtype: torch.dtype) -> Tensors:
    return [x.to(dtype, copy=True).requires_grad_() for x in inputs]


def right_padding(lengths: list[int], T: int) -> torch.Tensor:
    return torch.arange(T)[None, :] < torch.tensor(lengths)[:, None]


def document_rows(rows: list[list[int]]) -> torch.Tensor:
    """`[B, T]` document numbers from the lengths of each row's documents."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def random_splits(T: int, seed: int) -> list[int]:
    """Lengths >= 1 that sum to T."""
    cuts = torch.randperm(T - 1, generator=torch.Generator().manual_seed(seed))[:4] + 1
    borders = [0, *sorted(cuts.tolist()), T]
    return [b - a for a, b in pairwise(borders)]
