"""The family contract: where attention sits in an architecture and how its heads are made.

A family is a class of static facts and small functions about one Hugging Face `model_type`; nothing else in the package
branches on an architecture. Subclass it in a file named after the `model_type`. What is written here is what most
decoders do, so that a family file says only in what its architecture differs.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import nn

from linearize.mixers.base import Find, HeadShape

CONVERTED = "linearized_"
"""What the `model_type` of a converted model begins with; the source's `model_type` follows."""
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Family:
    """Static description of one architecture; never instantiated."""

    model_class: ClassVar[type]
    """The class that is converted, e.g. transformers.LlamaForCausalLM."""
    config_class: ClassVar[type]
    """Its configuration class."""
    attention_class: ClassVar[type]
    """The attention module class that a swap extends."""
    rotary: ClassVar[Callable[..., tuple[torch.Tensor, torch.Tensor]] | None] = None
    """The architecture's own `apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)`, as a staticmethod; None where
    attention knows no positions."""
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    """The Auto class of transformers that loads such models."""
    causal: ClassVar[bool] = True
    """Whether a query sees only tokens before it."""
    base: ClassVar[str] = "model"
    """Path, inside the model, of the module whose forward receives the 2-D attention mask and the position ids; "" for
    the model itself."""
    outer: ClassVar[str | None] = None
    """Path of a module around the one at `base` that makes the masks for it, and alone receives the 2-D one; None where
    the module at `base` does."""
    tells_positions: ClassVar[bool] = True
    """Whether attention is always given the position ids, which logits that grow with the length need."""
    attention: ClassVar[str] = "layers.{}.self_attn"
    """Path, inside that module, of layer {}'s attention."""
    lora_targets: ClassVar[dict[str, str]] = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
    """Short names q, k, v, o of the projections -> module names, for LoRA."""

    @classmethod
    def of(cls, config: Any, find: Find) -> type[Family]:
        """The family of a model with this configuration: this class, but for architectures made of others."""
        return cls

    @classmethod
    def base_model(cls, model: nn.Module) -> nn.Module:
        """The module at `base`."""
        return model.get_submodule(cls.base)

    @classmethod
    def logits(cls, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Predictions [..., vocabulary] from final hidden states [..., C], capped where the model caps them."""
        logits = model.get_output_embeddings()(hidden)
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @classmethod
    def attentions(cls, model: Any) -> dict[str, nn.Module]:
        """Full module name -> attention module, in layer order."""
        prefix = f"{cls.base}." if cls.base else ""
        depth = model.config.get_text_config().num_hidden_layers
        names = [prefix + cls.attention.format(i) for i in range(depth)]
        return {name: model.get_submodule(name) for name in names}

    @classmethod
    def packed_positions(cls, positions: torch.Tensor) -> torch.Tensor:
        """The positions [B or 1, T] of packed text, which restart with every document, as the base model must get them
        to keep the documents apart in its own masks.
        """
        return positions

    @classmethod
    def shape(cls, config: Any, layer: int) -> HeadShape:
        """Sizes of one layer's attention."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        return HeadShape(
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            key_dim=size,
            value_dim=size,
            hidden_size=text.hidden_size,
            scale=cls.scale(text, size, layer),
            softcap=getattr(text, "attn_logit_softcapping", None),
            reach=cls.reach(text, layer),
            causal=cls.causal,
        )

    @classmethod
    def scale(cls, config: Any, head_dim: int, layer: int) -> float:
        """Factor on q.k inside the softmax; `config` is that of the text model."""
        return (getattr(config, "query_pre_attn_scalar", None) or head_dim) ** -0.5

    @classmethod
    def reach(cls, config: Any, layer: int) -> int | None:
        """Last tokens that the layer's softmax sees, the query's own included; None for all."""
        kinds = getattr(config, "layer_types", None)
        if kinds is not None and kinds[layer] != "sliding_attention":
            return None
        return getattr(config, "sliding_window", None)

    @classmethod
    def project(cls, attn: Any, x: torch.Tensor) -> Heads:
        """[B, T, C] -> q [B, T, Hq, K], k [B, T, Hkv, K], v [B, T, Hkv, V], before any norm and rotary embedding."""
        heads = (*x.shape[:2], -1, attn.head_dim)
        return attn.q_proj(x).view(heads), attn.k_proj(x).view(heads), attn.v_proj(x).view(heads)

    @classmethod
    def normed(cls, attn: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q [B, T, Hq, K] and k [B, T, Hkv, K] after the source's norms of queries and keys; by default one on every
        head, if the module has any.
        """
        return (attn.q_norm(q), attn.k_norm(k)) if hasattr(attn, "q_norm") else (q, k)

    @classmethod
    def query_module(cls, attn: Any) -> nn.Module:
        """The last module that makes queries before they are rotated: a q-norm where there is one, else the
        projection.
        """
        return getattr(attn, "q_norm", None) or attn.q_proj

    @classmethod
    def scale_queries(cls, attn: Any, made: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """What `query_module` made, [B, T, ...], with the queries in it times factor [B or 1, T]."""
        return made * factor.view(*factor.shape, *(1,) * (made.ndim - 2))

    @classmethod
    def rotate(cls, attn: Any, q: torch.Tensor, k: torch.Tensor, position: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the layer's position embedding to q [B, T, Hq, K] and k [B, T, Hkv, K].

        `position` is the `position_embeddings` that attention was given: cos and sin [B or 1, T, R].
        """
        if cls.rotary is None:
            return q, k
        cos, sin = position
        return cls.rotary(q, k, cos, sin, unsqueeze_dim=2)

    @classmethod
    def position_at(cls, position: Any, index: torch.Tensor) -> Any:
        """`position` of the tokens with the indices [B, T'], in that order."""
        if position is None:
            return None
        rows = index.shape[0]
        return tuple(t.expand(rows, -1, -1).gather(1, index[..., None].expand(-1, -1, t.shape[-1])) for t in position)

    @classmethod
    def output_projection(cls, attn: Any) -> nn.Module | None:
        """The module that maps concatenated heads [B, T, Hq * V] to [B, T, C]; None where attention returns heads."""
        return attn.o_proj

    @classmethod
    def output(cls, attn: Any, heads: torch.Tensor) -> torch.Tensor:
        """What attention returns for the concatenated heads [B, T, Hq * V]."""
        projection = cls.output_projection(attn)
        return heads if projection is None else projection(heads)

    @classmethod
    def concerns(cls, config: Any, swapped: Collection[int]) -> list[str]:
        """What mixers in these layers do not honour on a model with this config; the plan prints it."""
        text, found = config.get_text_config(), []
        reaches: dict[int, list[int]] = {}
        for layer in sorted(swapped):
            if (reach := cls.reach(text, layer)) is not None:
                reaches.setdefault(reach, []).append(layer)
        for reach, layers in reaches.items():
            found.append(
                f"layers {_ranges(layers)} attended to the last {reach:,} tokens alone; a mixer there sees all before"
            )
        if (softcap := getattr(text, "attn_logit_softcapping", None)) is not None:
            found.append(f"logits are capped at {softcap:g} in softmax windows; the linear branch has no logits to cap")
        if dropout := cls.dropout(text):
            found.append(
                f"attention dropout {dropout:g} applies in training to layers that keep softmax, not to mixers"
            )
        return found

    @classmethod
    def dropout(cls, config: Any) -> float:
        """Probability with which training drops attention weights; `config` is that of the text model."""
        return getattr(config, "attention_dropout", 0.0) or 0.0


class VisionLanguage(Family):
    """A model with a vision tower whose language tower is of another family, at `model.language_model`.

    Subclasses say `model_class` and `config_class`; all else is the text family's. The vision tower is not touched.
    """

    auto_class = "AutoModelForImageTextToText"
    base = "model.language_model"

    @classmethod
    def of(cls, config: Any, find: Find) -> type[Family]:
        """This class in front of the family that the text config's `model_type` names."""
        text: Any = find("families", config.get_text_config().model_type)
        return _joined(cls, text)


class _Joined(type):
    """The class of families made of two, which no module holds under a name for pickle to find."""


def _joined(tower: type[Family], text: type[Family]) -> type[Family]:
    if (tower, text) not in _TOWERS:
        itself = classmethod(lambda joined, config, find: joined)
        joined: Any = _Joined(f"{tower.__name__}Of{text.__name__}", (tower, text), {"of": itself})
        _TOWERS[tower, text] = joined
    return _TOWERS[tower, text]


copyreg.pickle(_Joined, lambda joined: (_joined, joined.__bases__))  # type: ignore[arg-type, return-value]
_TOWERS: dict[tuple[type, type], type[Family]] = {}


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
