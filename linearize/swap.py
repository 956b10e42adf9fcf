"""Puts mixers into a model: the only code that sets attributes on one.

A swapped attention module stays the family's own class, extended: its projections keep their names, everything new
lives under `.mixer`, and the source model's softmax path is still there behind `teacher_path`. Every tensor of the
source checkpoint therefore keeps its name. Layers that keep their softmax are touched only where `Kept` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from linearize.families.base import Family
from linearize.hf.cache import state_layer
from linearize.kept import AS_IN_SOURCE, Kept, KeptAttention, QueryScale
from linearize.mixers.base import Context, Find, Mixer, State, config_from_dict


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

    def head(self, tokens: int) -> Batch:
        """The same for the first `tokens` columns alone."""
        if self.real is not None:
            return _padded(self.real[:, :tokens])
        return Batch(None, None if self.documents is None else self.documents[:, :tokens], None, None)


def read_batch(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, rows: int, tokens: int, has_past: bool
) -> Batch:
    """Turn Hugging Face's mask and position ids into a `Batch`.

    Args:
        attention_mask: [B, past + T], 1 for real tokens; a 4-D or absent mask says nothing about padding.
        position_ids: [B or 1, T]; where they do not rise by one, a packed document begins (only read without a mask and
            without a past, as Hugging Face's own masks do).
        rows: B.
        tokens: T.
        has_past: whether a cache already holds tokens.
    """
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            return Batch(None, None, None, None)
        return _padded(attention_mask[:, -tokens:].bool())
    if position_ids is None or has_past or position_ids.ndim != 2:
        return Batch(None, None, None, None)
    begins = position_ids[:, 1:] - position_ids[:, :-1] != 1
    if not begins.any():
        return Batch(None, None, None, None)
    documents = torch.nn.functional.pad(begins.cumsum(1), (1, 0))
    return Batch(None, documents.expand(rows, -1), None, None)


def _padded(mask: torch.Tensor) -> Batch:
    if mask.shape[1] == 1 and torch.compiler.is_compiling():
        return Batch(mask, None, None, None)  # a compiled decoding step cannot branch on data
    if mask.all():
        return Batch(None, None, None, None)
    if not (mask[:, 1:] & ~mask[:, :-1]).any():
        return Batch(mask, None, None, None)
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    return Batch(mask.gather(1, order), None, order, torch.argsort(order, dim=1))


class SwappedAttention(nn.Module):
    """What a swap adds to a family's attention class, in front of it in the method resolution order."""

    mixer: Mixer
    family: type[Family]
    teacher: bool

    def heads(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        batch: Batch,
        state: State | None = None,
        values: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, State]:
        """The mixer's head outputs [B, T, Hq, V], before the output projection, and its state.

        `values` [B, T, Hkv, V'] replace the layer's own: one-hot values read out the mixing matrix.
        """
        q, k, v = self.family.project(self, hidden_states)
        v = v if values is None else values
        cos, sin = position_embeddings
        if batch.order is not None:
            order = batch.order
            q, k, v, x = (reordered(t, order) for t in (q, k, v, hidden_states))
            cos, sin = (reordered(t.expand(order.shape[0], -1, -1), order) for t in (cos, sin))
        else:
            x = hidden_states

        def rotary(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.family.rotate(q, k, cos, sin)

        y, state = self.mixer(q, k, v, x, Context(rotary, batch.mask, batch.documents), state)
        return (y if batch.inverse is None else reordered(y, batch.inverse)), state

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        linearize_batch: Batch | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if self.teacher:
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        batch = linearize_batch or Batch(None, None, None, None)
        memory = None if past_key_values is None else state_layer(past_key_values, int(self.layer_idx))  # type: ignore[arg-type]
        state = None if memory is None else memory.state
        y, state = self.heads(hidden_states, position_embeddings, batch, state)
        if memory is not None:

            def replay(past: State | None, tokens: int) -> State:
                rotary = tuple(t[:, :tokens] for t in position_embeddings)
                return self.heads(hidden_states[:, :tokens], rotary, batch.head(tokens), past)[1]

            memory.advance(state, hidden_states.shape[1], replay)
        return self.family.output_projection(self)(y.flatten(-2).to(hidden_states.dtype)), None


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
        if spec is None:
            scale = None if kept.log_scale is None else QueryScale(attn, family)
            attn.kept, attn.query_scale = kept, scale  # type: ignore[assignment]
            attn.__class__ = _extended(KeptAttention, "Kept", family)
            continue
        mixer_class, config = spec
        attn.mixer = mixer_class(config, family.shape(model.config, layer))
        attn.family = family  # type: ignore[assignment]
        attn.__class__ = _extended(SwappedAttention, "Linearized", family)
    if any(spec is not None for spec in specs):
        family.base_model(model).register_forward_pre_hook(_attach_batch, with_kwargs=True)


_EXTENDED: dict[tuple[type, type], type] = {}


def _extended(front: type, prefix: str, family: type[Family]) -> type:
    """The family's attention class with `front` before it."""
    attention = family.attention_class
    if (front, attention) not in _EXTENDED:
        _EXTENDED[front, attention] = type(f"{prefix}{attention.__name__}", (front, attention), {})
    return _EXTENDED[front, attention]


def _attach_batch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    inputs = next(x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    past = kwargs.get("past_key_values")
    has_past = past is not None and past.get_seq_length() > 0
    rows, tokens = inputs.shape[:2]
    batch = read_batch(mask, kwargs.get("position_ids"), rows, tokens, has_past)
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
