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
from ops.op_cases import assert_close
from pico import small_mixer
from torch.utils._pytree import tree_leaves

from linearize import registry
from linearize.hf.auto import find_class
from linearize.mixers.base import Mixer, State, config_from_dict
from linearize.mixers.composed import ComposedConfig
from linearize.mixers.parts.base import Part
from linearize.testing.calls import KV_HEADS, inputs, new_mixer, run


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


NATIVE: dict[str, Any] = {
    "source_norm": False,
    "conv": {"activation": "silu"},
    "update": {"bias": False},
    "output": {"gate_bias": False, "eps": 1e-6},
    "chunk_size": 16,
}
"""Gated DeltaNet as Qwen3-Next has it."""


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
        return new_mixer(cls, config, kv_heads=kv_heads, dtype=dtype)


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
    shut = {"norm": "rms", "gate": "silu", "gate_bias": False}
    cases += [Case("composed", {"output": {**shut, **rank}}) for rank in ({}, {"gate_rank": 3})]
    cases += [Case("gdn", NATIVE)]
    unique = {str(case): case for case in cases}
    return [case for case in unique.values() if case.key != "composed" or is_possible(case)]


def assert_same_state(state: State, expected: State, tolerance: float) -> None:
    assert state.keys() == expected.keys()
    assert_close(tree_leaves(state), tree_leaves(expected), tolerance)


CASES = find_cases()
