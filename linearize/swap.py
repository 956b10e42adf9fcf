"""Puts mixers into a model: the only code that sets attributes on one.

A swapped attention module stays the family's own class, extended: its projections keep their names, everything new
lives under `.mixer`, and the source model's softmax path is still there behind `teacher_path`. Every tensor of the
source checkpoint therefore keeps its name. Layers that keep their softmax are touched only where `Kept` asks for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from linearize.families.base import Family
from linearize.hf.cache import state_layer
from linearize.kept import AS_IN_SOURCE, Kept, KeptAttention, QueryScale
from linearize.mixers.base import Context, Find, Mixer, State, build_mixer, config_from_dict
from linearize.ops.layout import expand_heads
from linearize.ops.window import capped


@dataclass(frozen=True)
class Batch:
    """What the base model knows about a batch and every swapped layer needs, computed once per forward."""

    mask: torch.Tensor | None
    """[B, T] bool with the real tokens first in each row, or None."""
    documents: torch.Tensor | None
    """[B, T] int document ids, or None."""
    order: torch.Tensor | None
    """[B, T] gather index that brings real tokens to the front of their row, or None when they are there."""
    inverse: torch.Tensor | None
    """[B, T] gather index that undoes `order`."""

    @property
    def real(self) -> torch.Tensor | None:
        """[B, T] bool, which tokens are real where the batch has them, or None for all."""
        return self.mask if self.mask is None or self.inverse is None else self.mask.gather(1, self.inverse)

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """The same elsewhere: accelerate moves what a layer on another device is given by its `to`."""
        tensors = (self.mask, self.documents, self.order, self.inverse)
        return Batch(*(t if t is None else t.to(*args, **kwargs) for t in tensors))

    def head(self, tokens: int) -> Batch:
        """The same for the first `tokens` columns alone."""
        if self.real is not None:
            return _padded(self.real[:, :tokens])
        return Batch(None, None if self.documents is None else self.documents[:, :tokens], None, None)


NO_BATCH = Batch(None, None, None, None)
"""Nothing is padded, and every row is one document."""


def read_batch(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, rows: int, tokens: int, has_past: bool
) -> Batch:
    """Turn Hugging Face's mask and position ids into a `Batch`.

    Args:
        attention_mask: [B, past + T], 1 for real tokens; a 4-D or absent mask says nothing about padding.
        position_ids: [B or 1, T], or [4, B, T] of which the first are the text's (Qwen2.5-VL); where they do not rise
            by one, a packed document begins (only read without a mask and without a past, as Hugging Face's own masks
            do).
        rows: B.
        tokens: T.
        has_past: whether a cache already holds tokens.
    """
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            return NO_BATCH
        return _padded(attention_mask[:, -tokens:].bool())
    if position_ids is not None and position_ids.ndim == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[0]
    if position_ids is None or has_past or position_ids.ndim != 2:
        return NO_BATCH
    begins = position_ids[:, 1:] - position_ids[:, :-1] != 1
    if not begins.any():
        return NO_BATCH
    documents = torch.nn.functional.pad(begins.cumsum(1), (1, 0))
    return Batch(None, documents.expand(rows, -1), None, None)


def _padded(mask: torch.Tensor) -> Batch:
    if torch.compiler.is_compiling():  # cannot branch on data
        if mask.shape[1] == 1:
            return Batch(mask, None, None, None)
    elif mask.all():
        return NO_BATCH
    elif not (mask[:, 1:] & ~mask[:, :-1]).any():
        return Batch(mask, None, None, None)
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    return Batch(mask.gather(1, order), None, order, torch.argsort(order, dim=1))


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
        """Read the arguments of a forward call, which architectures name and order differently."""
        all_given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        return Call(
            all_given["hidden_states"],
            all_given.get("position_embeddings"),
            all_given.get("past_key_values", all_given.get("layer_past")),
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


See = Callable[[str, SwappedAttention, Call, torch.Tensor, torch.Tensor], None]
"""Looks into a layer, see `run_teacher`."""


def teacher_logits(attn: SwappedAttention, call: Call, queries: slice = slice(None)) -> torch.Tensor:
    """The source's softmax logits [B, Hq, T', T] of these queries over all keys, float32, -inf where they see nothing.

    Real tokens come first in a row, as `batch` has them; scale, cap, reach and direction are the source's.
    """
    x, position, _, batch = call
    shape = attn.mixer.shape
    q, k, _ = attn.family.project(attn, x)
    q, k = attn.family.rotate(attn, q, k, position)
    if batch.order is not None:
        q, k = reordered(q, batch.order), reordered(k, batch.order)
    scores = torch.einsum("bihd,bjhd->bhij", q[:, queries].float(), expand_heads(k, q.shape[2]).float()) * shape.scale
    scores = capped(scores, shape.softcap)
    place = torch.arange(x.shape[1], device=x.device)
    age = place[queries, None] - place[None, :]
    seen = torch.ones_like(age, dtype=torch.bool)
    if shape.causal:
        seen = age >= 0
    if shape.reach is not None:
        seen = seen & (age.abs() < shape.reach)
    seen = seen[None]
    if batch.documents is not None:
        seen = seen & (batch.documents[:, queries, None] == batch.documents[:, None, :])
    if batch.mask is not None and not shape.causal:
        seen = seen & (batch.mask[:, None, :] | (age == 0))
    return scores.masked_fill(~seen[:, None], float("-inf"))


def reordered(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x [B, T, ...] with its tokens in the order of the index [B, T]."""
    index = order.view(*order.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


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
        base = family.base_model(model)
        attach = partial(_attach_batch, names=_positional(type(base).forward), packs=family.causal)
        base.register_forward_pre_hook(attach, with_kwargs=True)


_EXTENDED: dict[tuple[type, type], type] = {}


def _extended(front: type, prefix: str, family: type[Family]) -> type:
    """The family's attention class with `front` before it."""
    attention = family.attention_class
    if (front, attention) not in _EXTENDED:
        facts = {"names": _positional(attention.forward)}  # type: ignore[attr-defined]
        _EXTENDED[front, attention] = type(f"{prefix}{attention.__name__}", (front, attention), facts)
    return _EXTENDED[front, attention]


def _positional(function: Any) -> tuple[str, ...]:
    """Names of the arguments that a method takes by position, without self."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self")


def _attach_batch(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], *, names: tuple[str, ...], packs: bool
) -> tuple[tuple, dict[str, Any]]:
    """Give the base model's layers the batch. `names` are those of its arguments, in order; `packs` says whether the
    architecture tells packed documents apart.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    past = given.get("past_key_values")
    has_past = past is not None and past.get_seq_length() > 0
    rows, tokens = inputs.shape[:2]  # type: ignore[union-attr]
    positions = given.get("position_ids") if packs else None
    batch = read_batch(given.get("attention_mask"), positions, rows, tokens, has_past)
    return args, {**kwargs, "linearize_batch": batch}


def swapped(model: nn.Module) -> dict[str, SwappedAttention]:
    """Full module name -> swapped attention, in layer order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SwappedAttention)}


@contextmanager
def teacher_path(model: nn.Module) -> Iterator[None]:
    """Inside the context every swapped layer runs the source model's softmax attention instead of its mixer, and every
    kept layer the source's.
    """
    layers = [m for m in model.modules() if isinstance(m, SwappedAttention | KeptAttention)]
    before = [layer.teacher for layer in layers]
    for layer in layers:
        layer.teacher = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.teacher = value


def run_teacher(model: nn.Module, inputs: Mapping[str, torch.Tensor], see: See) -> None:
    """Run the softmax teacher's body, and look into each swapped layer as it passes.

    Args:
        model: a converted model.
        inputs: what the base model takes: input_ids [B, T], and where they apply position_ids and attention_mask.
        see: called with (full name, attention, call, heads [B, T, Hq * V], output [B, T, C]) after each layer's
            attention: what it was given, the teacher's head outputs, and what it returned.
    """
    heads: dict[str, torch.Tensor] = {}
    hooks = []
    layers = swapped(model)
    for name, attn in layers.items():

        def keep(module: nn.Module, args: tuple, name: str = name) -> None:
            heads[name] = args[0]

        def after(attn: Any, args: tuple, kwargs: dict[str, Any], output: Any, name: str = name) -> None:
            see(name, attn, attn.given(args, kwargs), heads.pop(name, output[0]), output[0])
            heads.pop(name, None)  # `see` may have run the projection; what stayed would keep a graph per layer alive

        if (projection := attn.family.output_projection(attn)) is not None:
            hooks.append(projection.register_forward_pre_hook(keep))
        hooks.append(attn.register_forward_hook(after, with_kwargs=True))
    family = next(iter(layers.values())).family
    options = {"use_cache": False} if family.causal else {}
    try:
        with teacher_path(model):
            family.base_model(model)(**inputs, **options)
    finally:
        for hook in hooks:
            hook.remove()


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
