"""The contract of native architectures: converted models that are exactly a model that transformers already has.

A native is a class of static facts and functions about one such architecture, in a file named after its `model_type`;
nothing else branches on it. It says what of a conversion stands in the way, and how configuration and tensors are
written its way. `linearize.hf.native` picks one, fills it, and checks its logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch

from linearize.families.base import CONVERTED
from linearize.hf.auto import find_class
from linearize.kept import Kept, kept_of
from linearize.mixers.base import Mixer
from linearize.mixers.composed import Composed
from linearize.swap import mixer_specs

Tensors = dict[str, torch.Tensor]


class Native:
    """Static description of one architecture; never instantiated. `config` is that of a converted model throughout."""

    model_class: ClassVar[type]
    """Its class in transformers."""
    sources: ClassVar[tuple[str, ...]]
    """`model_type` of the models that a conversion may start from."""

    @classmethod
    def obstacles(cls, config: Any) -> list[str]:
        """Every reason why the converted model is not one of these, each with the setting that removes it, where one
        exists; empty where there is none.
        """
        raise NotImplementedError

    @classmethod
    def config(cls, config: Any) -> Any:
        """The native configuration."""
        raise NotImplementedError

    @classmethod
    def weights(cls, tensors: Tensors, config: Any) -> Tensors:
        """The native state dict, made of the converted model's.

        Every tensor that has been used, or has no effect, is taken out of `tensors`: what stays has no place.
        """
        raise NotImplementedError


class Conversion(NamedTuple):
    """What a converted model's configuration says about its layers."""

    source: str
    """`model_type` of the source."""
    layers: list[tuple[type[Mixer], Any] | None]
    """(class, config) of each layer's mixer; None where softmax stayed."""
    kept: Kept


def conversion(config: Any) -> Conversion:
    """Read the configuration of a converted model."""
    specs = mixer_specs(config.linearize, find_class)
    return Conversion(config.model_type.removeprefix(CONVERTED), specs, kept_of(config.linearize))


class Wanted(NamedTuple):
    """A setting of mixers that an architecture fixes."""

    key: str
    """Path of the setting, as recipes write it below `mixer`."""
    value: Any
    why: str
    """What the architecture has there."""
    part: bool = False
    """Whether the setting is a part, and `value` its type."""
    ok: Callable[[Any], bool] | None = None
    """Whether a value will do, where more than one does."""


def made_of_parts(mixer: type) -> bool:
    """Whether a mixer's class does what its parts' settings say, and nothing of its own."""
    return issubclass(mixer, Composed) and mixer.forward is Composed.forward


def differing(settings: Any, wanted: tuple[Wanted, ...]) -> list[str]:
    """What a mixer's config has that is not wanted, in words."""
    found = []
    for want in wanted:
        value = settings
        for name in want.key.split("."):
            value = getattr(value, name, want.value)  # another part lacks the setting, and is named for itself
        value = value.type if want.part else value
        if not (want.ok(value) if want.ok else value == want.value):
            found.append(f"mixer.{want.key} is {_written(value)}: {want.why}; set it to {_written(want.value)}")
    return found


def _written(value: Any) -> str:
    return json.dumps(value).strip('"')
