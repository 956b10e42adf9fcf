"""What the tests of single parts share: parts in float64, filled as a swap fills them, random tensors, and arithmetic
on single numbers for formulas.
"""

import math
from typing import Any

import pytest
import torch

from linearize.mixers.base import HeadShape
from linearize.mixers.parts.base import Part
from linearize.registry import find

SHAPE = HeadShape(heads=4, kv_heads=2, key_dim=6, value_dim=5, hidden_size=7, scale=0.4)
HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, HIDDEN = 4, 2, 6, 5, 7


Vector = list[float]


def built(kind: str, key: str, *, moved: bool = True, shape: HeadShape = SHAPE, **settings: Any) -> Any:
    """The part `key` of `kind`, such as "decays", in float64."""
    cls: Any = find(f"mixers.parts.{kind}", key, Part)
    return started(cls(cls.Config(**settings), shape), moved=moved)


@torch.no_grad()
def started(part: Any, *, moved: bool = True) -> Any:
    """The part in float64 with its declared first values, and moved away from them unless `moved` is False."""
    inits, noise = part.double().inits(), torch.Generator().manual_seed(1)
    for name, parameter in part.named_parameters():
        inits[name].fill(parameter, name=name, seed=0)
        if moved:
            parameter += 0.3 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
    return part


def randn(*sizes: int, seed: int = 0) -> torch.Tensor:
    """Standard normal values in float64."""
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal(result: torch.Tensor, expected: Any) -> None:
    """Equal up to the rounding of float64; `expected` may be nested lists."""
    assert result.dtype == torch.float64
    if not isinstance(expected, torch.Tensor):
        expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(result, expected, atol=1e-10, rtol=1e-9)


def cases(table: dict[str, tuple[list[dict[str, Any]], Any]]) -> Any:
    """Parametrises a test by key and settings; table holds (many settings, formula) by key."""
    every = [(key, settings) for key, (many, _) in table.items() for settings in many]
    return pytest.mark.parametrize(("key", "settings"), every, ids=str)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def softplus(z: float) -> float:
    return math.log(1 + math.exp(z))


def softmax(z: Vector) -> Vector:
    total = sum(math.exp(value) for value in z)
    return [math.exp(value) / total for value in z]


def times(x: Vector, matrix: torch.Tensor) -> Vector:
    """x W for W [len(x), n], one sum after the other."""
    return [sum(x[d] * float(matrix[d, f]) for d in range(len(x))) for f in range(matrix.shape[1])]


def dot(x: Vector, weight: torch.Tensor) -> float:
    return sum(a * float(b) for a, b in zip(x, weight, strict=True))
