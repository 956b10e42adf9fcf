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


@dataclass(frozen=True)
class SignedIdentity(Init):
    """[I, -I, 0] on the last two dimensions, the same for all leading ones: relu of it keeps both signs."""

    def fill(self, tensor: torch.Tensor, *, name: str, seed: int) -> None:
        rows, columns = tensor.shape[-2:]
        matrix = torch.zeros(rows, columns, dtype=tensor.dtype, device=tensor.device)
        half = columns // 2
        matrix[:, :half] = torch.eye(rows, half)
        matrix[:, half : 2 * half] = -torch.eye(rows, half)
        tensor.copy_(matrix.expand_as(tensor))

    def __str__(self) -> str:
        return "identity and its negative per head"


@dataclass(frozen=True)
class KaimingUniform(Init):
    """Uniform within sqrt(3 / fan-in), which keeps the variance; the fan-in is that of one head, the rows of [.., D,
    F].

    Taking the fan-in of the whole tensor, as torch.nn.init does for three dimensions, makes heads too small.
    """

    def fill(self, tensor: torch.Tensor, *, name: str, seed: int) -> None:
        bound = (3 / tensor.shape[-2]) ** 0.5
        values = torch.rand(tensor.shape, generator=seeded(name, seed))
        tensor.copy_(values.mul_(2 * bound).sub_(bound))

    def __str__(self) -> str:
        return "uniform with the fan-in of one head"


@dataclass(frozen=True)
class PerHead(Init):
    """One value per head, the first dimension; the same for all that follows it."""

    values: tuple[float, ...]
    meaning: str
    """What the plan prints."""

    def fill(self, tensor: torch.Tensor, *, name: str, seed: int) -> None:
        values = torch.tensor(self.values, dtype=torch.float64).to(tensor)
        tensor.copy_(values.view(-1, *[1] * (tensor.ndim - 1)).expand_as(tensor))

    def __str__(self) -> str:
        return self.meaning


@dataclass(frozen=True)
class LastTap(Init):
    """A causal convolution [channels, size] that passes its input on, times `value`: only the current token counts."""

    value: float = 1.0

    def fill(self, tensor: torch.Tensor, *, name: str, seed: int) -> None:
        tensor.zero_()
        tensor[..., -1] = self.value

    def __str__(self) -> str:
        return f"{self.value:g} times the current token"
