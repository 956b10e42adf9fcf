"""Puts mixers into a model: the only code that sets attributes on one.

A swapped attention module stays the family's own class, extended: its projections keep their names, everything new
lives under `.mixer`, and the source model's softmax path is still there behind `teacher_path`. Every tensor of the
source checkpoint therefore keeps its name. Layers that keep their softmax are touched only where `Kept` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from linearize.arguments import by_name, cache_of, not_found, positional
from linearize.batch import NO_BATCH, Batch, read_batch, reordered
from linearize.families.base import Family
from linearize.hf.cache import state_layer
from linearize.kept import AS_IN_SOURCE, Kept, KeptAttention, QueryScale
from linearize.mixers.base import Context, Find, Mixer, State, build_mixer, config_from_dict
from linearize.snapshot import Snapshot


class Call(NamedTuple):
    """What a decoder layer gave its attention module."""

    x: torch.Tensor
    """[B, T, C] the layer's input."""
    position: Any
    """The family's `position_embeddings`, or None."""
    cache: Any
    """The model's cache, or None."""
    batch: Batch
    """What the base model knows about the batch."""


class SwappedAttention(nn.Module):
    """What a swap adds to a family's attention class, in front of it in the method resolution order."""

    mixer: Mixer
    family: type[Family]
    teacher: bool
    names: ClassVar[tuple[str, ...]]
    """Names of the arguments of the family's attention, in order."""

    def given(self, args: tuple, kwargs: Mapping[str, Any]) -> Call:
        """Read the arguments of a forward call, which architectures name and order differently.

        Raises:
            ValueError: where a cache is to be used that cannot be found.
        """
        all_given = by_name(self.names, args, kwargs)
        cache = cache_of(all_given)
        if cache is None and all_given.get("use_cache"):
            raise ValueError(not_found(f"layer {self.layer_idx} is told to use a cache, and is given none"))
        return Call(
            all_given["hidden_states"],
            all_given.get("position_embeddings"),
            cache,
            all_given.get("linearize_batch") or NO_BATCH,
        )

    def heads(
        self,
        x: torch.Tensor,
        position: Any,
        batch: Batch,
        state: State | None = None,
        values: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, State]:
        """The mixer's head outputs [B, T, Hq, V], before the output projection, and its state.

        Args:
            x: [B, T, C] the layer's input.
            position: what the family's `rotate` reads.
            batch: padding and documents.
            state: the mixer's state before these tokens.
            values: [B, T, Hkv, V'] that replace the layer's own: one-hot values read out the mixing matrix.
        """
        q, k, v = self.family.project(self, x)
        if self.mixer.source_norm:
            q, k = self.family.normed(self, q, k)
        v = v if values is None else values
        if batch.order is not None:
            q, k, v, x = (reordered(t, batch.order) for t in (q, k, v, x))
            position = self.family.position_at(position, batch.order)

        def rotary(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.family.rotate(self, q, k, position)

        y, state = self.mixer(q, k, v, x, Context(rotary, batch.mask, batch.documents), state)
        return (y if batch.inverse is None else reordered(y, batch.inverse)), state

    def forward(self, *args: Any, linearize_batch: Batch | None = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
        if self.teacher:
            return super().forward(*args, **kwargs)
        x, position, cache, batch = self.given(args, {**kwargs, "linearize_batch": linearize_batch})
        memory = None if cache is None else state_layer(cache, int(self.layer_idx))  # type: ignore[arg-type]
        state = None if memory is None else memory.state
        y, state = self.heads(x, position, batch, state)
        if memory is not None:
            disabled = self.mixer.disabled

            def replay(past: State | None, tokens: int) -> State:
                first = torch.arange(tokens, device=x.device).expand(x.shape[0], -1)
                with self.mixer.without(disabled):
                    there = self.family.position_at(position, first)
                    return self.heads(x[:, :tokens], there, batch.head(tokens), past)[1]

            memory.advance(state, x.shape[1], replay)
        return self.family.output(self, y.flatten(-2).to(x.dtype)), None


def swap_layers(
    model: nn.Module,
    family: type[Family],
    specs: Sequence[tuple[type[Mixer], Any] | None],
    kept: Kept = AS_IN_SOURCE,
) -> None:
    """Replace the attention of each layer that has a spec (mixer class, config); None keeps it, changed as `kept` says.

    New parameters are left uninitialised: they are either filled by `Mixer.initialise` or loaded.
    """
    for layer, (spec, attn) in enumerate(zip(specs, family.attentions(model).values(), strict=True)):
        if spec is None and kept == AS_IN_SOURCE:
            continue
        assert type(attn) is family.attention_class, f"layer {layer} is already swapped: {type(attn)}"
        attn.teacher = False  # type: ignore[assignment]
        attn.family = family  # type: ignore[assignment]
        if spec is None:
            scale = None if kept.log_scale is None else QueryScale(attn, family)
            attn.kept, attn.query_scale = kept, scale  # type: ignore[assignment]
            attn.__class__ = _extended(KeptAttention, "Kept", family)
            continue
        mixer_class, config = spec
        attn.mixer = build_mixer(mixer_class, config, family.shape(model.config, layer))
        attn.__class__ = _extended(SwappedAttention, "Linearized", family)
    if any(spec is not None for spec in specs):
        modules = [family.base_model(model)] + ([] if family.outer is None else [model.get_submodule(family.outer)])
        for module in modules:
            attach = partial(_attach_batch, names=positional(type(module).forward), family=family)
            module.register_forward_pre_hook(attach, with_kwargs=True)


_EXTENDED: dict[tuple[type, type], type] = {}


def _extended(front: type, prefix: str, family: type[Family]) -> type:
    """The family's attention class with `front` before it."""
    attention = family.attention_class
    if (front, attention) not in _EXTENDED:
        facts: dict[str, Any] = {"names": positional(attention.forward)}  # type: ignore[attr-defined]
        facts["__reduce_ex__"] = lambda attn, _: (_unpickled, (front, prefix, family), vars(attn))
        _EXTENDED[front, attention] = type(f"{prefix}{attention.__name__}", (front, attention), facts)
    return _EXTENDED[front, attention]


def _unpickled(front: type, prefix: str, family: type[Family]) -> nn.Module:
    cls: Any = _extended(front, prefix, family)
    return cls.__new__(cls)


def _attach_batch(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], *, names: tuple[str, ...], family: type[Family]
) -> tuple[tuple, dict[str, Any]]:
    """Give the base model's layers the batch, and where documents are packed the positions in the family's form, for
    the layers that keep softmax and for the teacher's. `names` are those of its arguments, in order.
    """
    given = by_name(names, args, kwargs)
    if "linearize_batch" in given:  # from the module around this one
        return args, kwargs
    inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    past = cache_of(given)
    has_past = past is not None and past.get_seq_length() > 0
    rows, tokens = inputs.shape[:2]  # type: ignore[union-attr]
    positions = given.get("position_ids") if family.causal else None
    batch = read_batch(given.get("attention_mask"), positions, rows, tokens, has_past)
    if batch.documents is not None and positions is not None and positions.ndim == 2:
        # As keyword arguments only, so that the changed positions need no place among the others.
        return (), {**given, "position_ids": family.packed_positions(positions), "linearize_batch": batch}
    return args, {**kwargs, "linearize_batch": batch}


def swapped(model: nn.Module) -> dict[str, SwappedAttention]:
    """Full module name -> swapped attention, in layer order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SwappedAttention)}


def source_weights(model: nn.Module) -> Snapshot:
    """The source's values of what training changed in the model, for each model one object."""
    if "source_weights" not in vars(model):
        model.source_weights = Snapshot()  # type: ignore[assignment]
    return model.source_weights  # type: ignore[return-value]


@contextmanager
def student_path(module: nn.Module, weights: Snapshot) -> Iterator[None]:
    """Inside the context, and inside `teacher_path` of a model with these weights, a module of it is the student's."""
    with softmax_path(module, False), _adapters(module, True), weights.as_trained():
        yield


@contextmanager
def teacher_path(model: nn.Module) -> Iterator[None]:
    """Inside the context the model is the source: swapped layers run softmax attention, not their mixers, kept ones the
    source's, adapters are off, and tensors that training changed have the values that `source_weights` kept.
    """
    with softmax_path(model), _adapters(model, False), source_weights(model).as_kept():
        yield


@contextmanager
def softmax_path(module: nn.Module, on: bool = True) -> Iterator[None]:
    """Inside the context layers run the source's attention in place of mixers (or not, if `on` is False), with the
    weights and adapters that they have.
    """
    layers = [m for m in module.modules() if isinstance(m, SwappedAttention | KeptAttention)]
    before = [layer.teacher for layer in layers]
    for layer in layers:
        layer.teacher = on
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.teacher = value


@contextmanager
def _adapters(module: nn.Module, on: bool) -> Iterator[None]:
    """peft's own method also changes what requires gradients."""
    layers: list[Any] = [m for m in module.modules() if hasattr(m, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = not on
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


def mixer_specs(description: Mapping[str, Any], find: Find) -> list[tuple[type[Mixer], Any] | None]:
    """Read what a checkpoint's config says about its layers.

    Args:
        description: `{"mixers": [{"type": key, ...settings}], "layers": [index into mixers, or None]}`; where kept
            layers are changed also `"kept"`, the fields of `linearize.kept.Kept`.
        find: (package, key) -> class of a mixer or of one of its parts.
    """
    built = []
    for mixer in description["mixers"]:
        cls = find("mixers", mixer["type"])
        built.append((cls, config_from_dict(cls.Config, {k: v for k, v in mixer.items() if k != "type"}, find)))
    return [None if index is None else built[index] for index in description["layers"]]
