"""Every mixer in every shape its config can take, and calls that the tests of mixers share.

`CASES` is found, not listed: each file of `linearize.mixers`, with its default settings, with small windows and
chunks, and from there with each switch of its config turned, alone and all together.
"""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from conftest import small_mixer
from ops.op_cases import assert_close
from torch.utils._pytree import tree_leaves

from linearize import registry
from linearize.hf.auto import find_class
from linearize.mixers.base import Context, HeadShape, Mixer, State, config_from_dict
from linearize.mixers.composed import ComposedConfig
from linearize.mixers.parts.base import Part

HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, HIDDEN = 4, 2, 8, 6, 12

Tensors = list[torch.Tensor]


def switches(config: type) -> Iterator[dict[str, Any]]:
    """Settings that each turn one switch: a bool, another choice of a Literal, or a number of sinks.

    The backend is no such switch: it chooses between kernels that need not run on this machine.
    """
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        if field.name == "backend":
            continue
        if hint is bool:
            yield {field.name: not field.default}
        elif typing.get_origin(hint) is typing.Literal:
            yield from ({field.name: choice} for choice in typing.get_args(hint) if choice != field.default)
        elif field.name == "sinks":
            yield {"sinks": 3}


def _short(value: Any) -> str:
    return ",".join(str(v) for v in value.values()) if isinstance(value, dict) else str(value)


@dataclass(frozen=True)
class Case:
    """A mixer's key and its settings, as a recipe writes them."""

    key: str
    settings: dict[str, Any]

    def __str__(self) -> str:
        return "-".join([self.key, *(f"{name}={_short(value)}" for name, value in self.settings.items())])

    @property
    def mixer_class(self) -> type[Mixer]:
        return registry.find("mixers", self.key, Mixer)

    @property
    def tolerance(self) -> float:
        """Relative; a norm divides the read-out's rounding by the read-out, which can be small."""
        output = getattr(self.mixer().config, "output", None)
        return 1e-5 if output is None or output.norm == "none" else 5e-5

    def has(self, field: str) -> bool:
        return field in {f.name for f in dataclasses.fields(self.mixer_class.Config)}

    def mixer(self, dtype: torch.dtype = torch.float32, kv_heads: int = KV_HEADS, **changes: Any) -> Mixer:
        """The mixer, initialised and then moved away from its symmetric first values; the same on every call."""
        cls = self.mixer_class
        config = config_from_dict(cls.Config, {**self.settings, **changes}, find_class)
        try:
            mixer = cls(config, HeadShape(HEADS, kv_heads, KEY_DIM, VALUE_DIM, HIDDEN, scale=0.4))
        except ValueError:  # a few need keys and values of one size; `run` pads the values for them
            mixer = cls(config, HeadShape(HEADS, kv_heads, KEY_DIM, KEY_DIM, HIDDEN, scale=0.4))
        mixer.initialise("mixer", seed=0)
        noise = torch.Generator().manual_seed(1)
        for parameter in mixer.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=noise)
        return mixer.to(dtype)


def parts(config: type) -> Iterator[dict[str, Any]]:
    """Settings that each take another part, and that turn each switch of a nested config."""
    for field in dataclasses.fields(config):
        default = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        if "part" in field.metadata:
            package = field.metadata["part"]
            for key in registry.keys(package):
                yield {field.name: {"type": key}}
                for switch in switches(registry.find(package, key, Part).Config):
                    yield {field.name: {"type": key, **switch}}
        elif dataclasses.is_dataclass(default):
            sized = {"size": 3} if hasattr(default, "size") else {}
            yield from ({field.name: {**sized, **switch}} for switch in switches(type(default)))


def is_possible(case: Case) -> bool:
    """Whether the mixer accepts this combination of parts."""
    try:
        run(case.mixer(), inputs(1, 2))
    except ValueError:
        return False
    return True


def find_cases() -> list[Case]:
    """Each mixer as it is and small; the composed one, of which they are made, with every switch and part as well."""
    cases = []
    for key in registry.keys("mixers"):
        config = registry.find("mixers", key, Mixer).Config
        small = {name: value for name, value in small_mixer(key).items() if name != "type"}
        cases += [Case(key, {}), Case(key, small)]
        if issubclass(config, ComposedConfig) and config is not ComposedConfig:
            cases += [Case(key, {**small, "sinks": 3})] if config().window else []
            continue
        turned = list(switches(config))
        together = {name: value for switch in turned for name, value in switch.items()}
        cases += [Case(key, {**small, **switch}) for switch in [*turned, together]]
    positive = {"feature_map": {"type": "hedgehog"}, "normalize": True, "window": 8, "chunk_size": 16}
    for settings in parts(ComposedConfig):
        cases.append(Case("composed", {"window": 8, "chunk_size": 16, **settings}))
        if settings.keys() & {"feature_map", "decay", "combine"}:
            cases.append(Case("composed", {**positive, **settings}))
    unique = {str(case): case for case in cases}
    return [case for case in unique.values() if case.key != "composed" or is_possible(case)]


def inputs(B: int, T: int, *, kv_heads: int = KV_HEADS, seed: int = 0) -> Tensors:
    """q [B, T, Hq, K], k [B, T, Hkv, K], v [B, T, Hkv, V], x [B, T, C]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(HEADS, KEY_DIM), (kv_heads, KEY_DIM), (kv_heads, VALUE_DIM), (HIDDEN,)]
    return [torch.randn(B, T, *size, generator=generator) for size in sizes]


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [B, T, H, K] at positions [B or 1, T], angles in float64 whatever the dtype of x."""
    half = x.shape[-1] // 2
    angles = positions.double()[..., None, None] * 100.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def run(
    mixer: Mixer,
    given: Tensors,
    state: State | None = None,
    *,
    start: int = 0,
    positions: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, State]:
    """One call of the mixer on tokens whose positions are given or count from `start`."""
    where = start + torch.arange(given[0].shape[1])[None] if positions is None else positions

    def rotary(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rotate(q, where), rotate(k, where)

    q, k, v, x = given
    v = torch.nn.functional.pad(v, (0, mixer.shape.value_dim - v.shape[-1]))
    return mixer(q, k, v, x, Context(rotary, mask, documents), state)


def run_pieces(mixer: Mixer, given: Tensors, lengths: list[int]) -> tuple[torch.Tensor, State]:
    """The same tokens in pieces, each with the state of the last."""
    outputs, state, start = [], None, 0
    for length in lengths:
        y, state = run(mixer, [x[:, start : start + length] for x in given], state, start=start)
        outputs.append(y)
        start += length
    assert state is not None and start == given[0].shape[1]
    return torch.cat(outputs, dim=1), state


def assert_same_state(state: State, expected: State, tolerance: float) -> None:
    assert state.keys() == expected.keys()
    assert_close(tree_leaves(state), tree_leaves(expected), tolerance)


def nbytes(state: State) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(state))


CASES = find_cases()
