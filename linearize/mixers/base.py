"""The mixer contract: what replaces softmax attention inside one layer.

A mixer knows heads, not Hugging Face: it takes projected q, k, v (before rotary embedding), the layer input for gates,
and a `Context`, and returns head outputs plus a state of constant size. One `forward` serves training, prefill, chunked
prefill and decoding; whether a state is given decides, never `self.training`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from linearize.errors import did_you_mean
from linearize.inits.base import Init

Backend = Literal["auto", "torch", "fla", "naive"]

State = dict[str, Any]
"""A small tree (dict or tuple) of tensors, each with the batch as its first dimension, of constant size."""


@dataclass(frozen=True)
class HeadShape:
    """Sizes of one attention layer, as its family reports them."""

    heads: int
    """Query heads, Hq."""
    kv_heads: int
    """Key and value heads, Hkv; query head h reads key head h // (Hq // Hkv)."""
    key_dim: int
    """Size of a query or key vector, K."""
    value_dim: int
    """Size of a value vector, V."""
    hidden_size: int
    """Size of the layer input, C."""
    scale: float
    """Factor on q.k inside the source model's softmax."""
    softcap: float | None = None
    """The source's logits are softcap * tanh(logit / softcap); None where they are not capped."""
    reach: int | None = None
    """Last tokens that the source's softmax sees, the query's own included; None for all."""
    causal: bool = True
    """Whether a query sees only tokens before it."""


@dataclass(frozen=True)
class Context:
    """What a mixer may know about the batch besides its heads."""

    rotary: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    """Applies the layer's position embedding to q [B, T, Hq, K] and k [B, T, Hkv, K]."""
    mask: torch.Tensor | None = None
    """[B, T] bool, True for real tokens. Real tokens always come first in a row; None when nothing is padded."""
    documents: torch.Tensor | None = None
    """[B, T] int, non-decreasing: which packed document a token belongs to; None for one document a row."""


class Mixer(nn.Module):
    """Base class of all mixers. A subclass lives in a file named after its recipe key.

    Args:
        config: an instance of the subclass's `Config`, a frozen dataclass.
        shape: sizes of the layer that the mixer serves.
    """

    Config: ClassVar[type]
    branches: ClassVar[tuple[str, ...]] = ()
    """Names of the parallel branches that `disabled` can switch off; empty when there is only one path."""

    def __init__(self, config: Any, shape: HeadShape):
        super().__init__()
        self.config = config
        self.shape = shape
        self.disabled: frozenset[str] = frozenset()
        self.bare = False

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        x: torch.Tensor,
        ctx: Context,
        state: State | None = None,
    ) -> tuple[torch.Tensor, State]:
        """Mix tokens.

        Args:
            q: [B, T, Hq, K] before rotary embedding, after any q-norm of the source if `source_norm` asks for it.
            k: [B, T, Hkv, K] likewise.
            v: [B, T, Hkv, V].
            x: [B, T, C] the layer input, for data-dependent gates.
            ctx: rotary function, padding and packed documents.
            state: what an earlier call returned, or None at the start of a sequence.

        Returns:
            y [B, T, Hq, V] and the state after the last real token of each row.
        """
        raise NotImplementedError

    @property
    def bidirectional(self) -> bool:
        """Whether it reads tokens after a query's own where `shape.causal` is false, as in an encoder."""
        return False

    @property
    def exact(self) -> int:
        """Last tokens, the current one included, that the mixer reads by softmax attention; 0 for none."""
        return 0

    @property
    def source_norm(self) -> bool:
        """Whether it is given queries and keys after the source's own norm of them, where the source has one."""
        return True

    @property
    def linear_in_values(self) -> bool:
        """Whether y is a weighted sum of values with weights that do not depend on them, so that one-hot values read
        the weights out."""
        return True

    @contextmanager
    def only_mixing(self) -> Iterator[None]:
        """Inside the context `bare` is true: values of any size are mixed as they are given, and what a mixer does to
        them before, adds to them or does to the read-out is left out. A mixer that does nothing of the kind has nothing
        to honour; one that does and ignores `bare` stays not linear in values.
        """
        before, self.bare = self.bare, True
        try:
            yield
        finally:
            self.bare = before

    @property
    def output_scale(self) -> nn.Parameter | None:
        """The factor per query head [Hq] on the recurrent branch's output, in which y is affine, or None without
        one.
        """
        return None

    @contextmanager
    def without(self, disabled: frozenset[str]) -> Iterator[None]:
        """Inside the context these branches, and no others, are switched off."""
        before, self.disabled = self.disabled, disabled
        try:
            yield
        finally:
            self.disabled = before

    def matrices(self, state: State) -> tuple[torch.Tensor, ...]:
        """The matrices [B, N, F, V] that the recurrent branch holds in a state, N heads times memories or levels, for
        probes to measure; none where a mixer does not say.
        """
        return ()

    def calibrate(self, measured: Any) -> None:
        """Set parameters from a `linearize.mixers.parts.base.Calibration` of the layer; by default there are none."""

    def inits(self) -> dict[str, Init]:
        """How each new parameter is initialised, by its name inside the mixer."""
        return {}

    @torch.no_grad()
    def initialise(self, name: str, seed: int) -> None:
        """Fill every parameter from its declared init, seeded by its full name under `name`.

        Seeding by name instead of by creation order gives any subset of layers the same tensors.
        """
        inits = self.inits()
        for key, parameter in self.named_parameters():
            inits[key].fill(parameter, name=f"{name}.{key}", seed=seed)


def build_mixer(mixer_class: type[Mixer], config: Any, shape: HeadShape) -> Mixer:
    """A mixer for a layer of this shape.

    Raises:
        ValueError: for settings that do not fit the shape, and for an encoder's layer if it reads backwards alone.
    """
    mixer = mixer_class(config, shape)
    if not shape.causal and not mixer.bidirectional:
        raise ValueError(
            "this layer reads in both directions, and the mixer in one; take linear attention without decay, window or "
            "convolution, such as hedgehog, t2r or based"
        )
    return mixer


@contextmanager
def branch_off(model: nn.Module, branch: str) -> Iterator[int]:
    """Switch one branch of every mixer of `model` off inside the context; yields how many mixers have it.

    The branch that remains gets the whole weight, which is the most favourable reading of "without it".
    """
    touched = [m for m in model.modules() if isinstance(m, Mixer) and branch in m.branches]
    before = [m.disabled for m in touched]
    for mixer in touched:
        mixer.disabled = mixer.disabled | {branch}
    try:
        yield len(touched)
    finally:
        for mixer, disabled in zip(touched, before, strict=True):
            mixer.disabled = disabled


def branches_of(model: nn.Module) -> list[str]:
    """Names of all branches that the mixers of `model` can switch off, sorted."""
    return sorted({branch for m in model.modules() if isinstance(m, Mixer) for branch in m.branches})


Find = Callable[[str, str], Any]
"""(package such as "mixers" or "mixers.parts.decays", key) -> the class that the key names."""


def _part_settings(value: Any, path: str) -> Any:
    """Settings of a part, from its name or as they are.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, str):
        return {"type": value}
    if isinstance(value, dict) and isinstance(value.get("type", ""), str):
        return value
    hint = "; a part that does nothing is called none" if value in (None, False) else ""
    raise ValueError(f"{path} must be the name of a part, or its settings with a type, got {value!r}{hint}")


def _construct(cls: type, values: dict[str, Any], where: str) -> Any:
    return cls(**values)


def config_from_dict(
    cls: type,
    values: dict[str, Any],
    find: Find,
    *,
    where: str = "",
    construct: Callable[[type, dict[str, Any], str], Any] = _construct,
) -> Any:
    """Build a (nested) config dataclass from plain data.

    A field that holds a part takes the part's name, or a dict with its `type` and settings; without `type`, or with the
    default's, the settings change the default's.

    Args:
        cls: the config class.
        values: settings; those that are missing keep their defaults.
        find: finds the class of a part.
        where: path of `values` in what the user wrote, for messages.
        construct: (class, values, where) -> instance; by default the class is called.

    Raises:
        ValueError: for a key that `cls` or a part does not have, and whatever the configs refuse.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    built = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        if key not in fields:
            raise ValueError(f"unknown key {path!r}{did_you_mean(key, fields)}")
        field = fields[key]
        default: Any = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if "part" in field.metadata:
            value = _part_settings(value, path)
        if not dataclasses.is_dataclass(default) or not isinstance(value, dict):
            built[key] = tuple(value) if isinstance(default, tuple) and isinstance(value, list) else value
            continue
        kind: type = type(default)
        before: dict[str, Any] = dataclasses.asdict(default)  # type: ignore[arg-type]
        settings = {**before, **value}
        if "part" in field.metadata and settings["type"] != before["type"]:
            part = find(field.metadata["part"], value["type"])
            if part.Config.part is not part:
                raise ValueError(
                    f"{path}: {value['type']!r} has the Config of {part.Config.part.__name__}, which would be built in "
                    f"its place; give it a Config of its own that derives from {part.Config.__name__}"
                )
            kind, settings = part.Config, value
        built[key] = config_from_dict(kind, settings, find, where=path, construct=construct)
    return construct(cls, built, where)
