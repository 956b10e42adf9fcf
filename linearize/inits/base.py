"""How a new tensor gets its first values: small declarative objects that a plan can print and a swap can run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


def seeded(name: str, seed: int) -> torch.Generator:
    """A CPU generator that depends on the tensor's full name and the run's seed, not on creation order."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Init:
    """One way to fill a tensor in place; `str()` of it is what the plan prints."""

    def fill(self, tensor: torch.Tensor, *, name: str, seed: int) -> None:
        """Fill `tensor` in place. `name` is its full name in the model and seeds any randomness."""
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Init):
    """Every element gets `value`."""

    value: float

    def fill(self, tensor: torch.Tensor, *, name: str, seed: int) -> None:
        tensor.fill_(self.value)

    def __str__(self) -> str:
        return f"constant {self.value:g}"


@dataclass(frozen=True)
class Identity(Init):
    """The identity on the last two dimensions, the same for all leading ones (per-head square maps)."""

    def fill(self, tensor: torch.Tensor, *, name: str, seed: int) -> None:
        eye = torch.eye(tensor.shape[-2], tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
        tensor.copy_(eye.expand_as(tensor))

    def __str__(self) -> str:
        return "identity per head"


@dataclass(frozen=True)
class Normal(Init):
    """Independent normal values with standard deviation `std`, seeded by the tensor's name."""

    std: float

    def fill(self, tensor: torch.Tensor, *, name: str, seed: int) -> None:
        values = torch.randn(tensor.shape, generator=seeded(name, seed))
        tensor.copy_(values.mul_(self.std))

    def __str__(self) -> str:
        return f"normal, std {self.std:g}"
