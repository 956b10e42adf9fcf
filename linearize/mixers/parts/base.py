"""What all parts share: a frozen config that names its part, declared initial values, and calibration.

A mixer's config holds part configs in fields made by `part`; recipes write them as a name or as settings with a `type`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from linearize.inits.base import Init
from linearize.mixers.base import HeadShape

PACKAGE = "mixers.parts"


@dataclass(frozen=True)
class PartConfig:
    """Base of all part configs. Subclasses give `type` their file's name as default."""

    __pydantic_config__ = {"extra": "forbid"}

    type: str = ""
    """Name of the part, or `module:Class` of one of your own."""
    part: ClassVar[Any] = None
    """The part's class, which sets this itself."""


@dataclass(frozen=True)
class Calibration:
    """What was measured on the teacher's softmax attention of one layer, all float32 `[Hq]`."""

    distance: torch.Tensor
    """Mean distance in tokens between a query and what it attends to beyond the mixer's window, weighted by
    attention.
    """
    entropy: torch.Tensor
    """Mean entropy of the attention weights over the logarithm of how many tokens are visible: 0 one token, 1
    uniform.
    """


class Part(nn.Module):
    """Base class of all parts."""

    Config: ClassVar[type[PartConfig]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" not in vars(cls):
            return
        owner = vars(cls.Config).get("part")
        if owner is not None and (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"{cls.__name__}.Config is {cls.Config.__name__}, which belongs to {owner.__qualname__} of "
                f"{owner.__module__}; give {cls.__name__} a config of its own: a dataclass that derives from it"
            )
        cls.Config.part = cls

    def inits(self) -> dict[str, Init]:
        """How each parameter is initialised, by its name inside the part; by default those of the parts inside."""
        return part_inits(self)

    def calibrate(self, measured: Calibration) -> None:
        """Set parameters in place from what was measured on the teacher; by default those of the parts inside."""
        calibrate_parts(self, measured)


def build(config: Any, shape: HeadShape) -> Any:
    """The part that `config` is of, for a layer of `shape`."""
    return config.part(config, shape)


def part(kind: str, default: type[PartConfig], **settings: Any) -> Any:
    """A field of a mixer's config that holds the config of a part of `kind`, such as "feature_maps"."""
    return field(default_factory=lambda: default(**settings), metadata={"part": f"{PACKAGE}.{kind}"})


def part_inits(module: nn.Module) -> dict[str, Init]:
    """The inits of all parts directly inside `module`, under their names there."""
    return {
        f"{name}.{key}": init
        for name, child in module.named_children()
        if isinstance(child, Part)
        for key, init in child.inits().items()
    }


def calibrate_parts(module: nn.Module, measured: Calibration) -> None:
    """Calibrate all parts directly inside `module`."""
    for child in module.children():
        if isinstance(child, Part):
            child.calibrate(measured)


def parts_of(config: Any) -> Iterator[tuple[str, PartConfig]]:
    """(package, config) of every part in a mixer's config, nested ones included."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if "part" in item.metadata:
            yield item.metadata["part"], value
        if dataclasses.is_dataclass(value):
            yield from parts_of(value)
