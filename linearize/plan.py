"""The plan: what a conversion will do to every layer, as data that can be printed before any weight moves.

`make_plan(recipe, config)` raises every error that a recipe can cause on this model. It needs the
model's configuration, not its weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from linearize.errors import UserError
from linearize.fake_run import on_torch, state_bytes, without_values
from linearize.families.base import Family
from linearize.hf.native import native_config, native_of
from linearize.kept import AS_IN_SOURCE, Kept
from linearize.mixers.base import HeadShape, Mixer, build_mixer
from linearize.positions import untaught
from linearize.recipe import Recipe
from linearize.recipe_plugins import mixer_config
from linearize.registry import family_of, find


@dataclass(frozen=True)
class NewTensor:
    """A tensor that the swap adds."""

    name: str
    shape: tuple[int, ...]
    init: str


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer."""

    index: int
    module: str
    mixer: str | None
    """Mixer key, or None when the layer keeps its softmax attention."""
    new: tuple[NewTensor, ...] = ()
    state_bytes: int = 0
    """Bytes of the decoding state of one sequence; constant in its length."""
    kv_bytes_per_token: int = 0
    """Bytes that the layer's softmax attention caches per token and sequence, whether it is kept or not."""
    reach: int | None = None
    """Last tokens that this attention sees, and caches; None for all."""

    def kv_bytes(self, tokens: int) -> int:
        """Bytes that the layer's softmax attention caches of a sequence of `tokens` tokens."""
        return self.kv_bytes_per_token * (tokens if self.reach is None else min(tokens, self.reach))


@dataclass(frozen=True)
class Plan:
    """What a conversion does to a model."""

    family: str
    source: str
    mixer: dict[str, Any]
    layers: tuple[LayerPlan, ...]
    source_parameters: int
    concerns: tuple[str, ...]
    dtype: str
    kept: Kept = AS_IN_SOURCE
    causal: bool = True
    """Whether it generates text, and so has a cache."""
    branches: tuple[str, ...] = ()
    """Of the mixers: what measurements can switch off."""
    chooser: str | None = None
    """The selector that chooses the layers once the model is loaded; until then `layers` is a stand-in."""
    choice: str = ""
    """What the selector reads for that."""
    native: str | None = None
    """`model_type` of the architecture of transformers that the result is exported as; None for one of its own."""

    def description(self) -> dict[str, Any]:
        """What the checkpoint's config stores: see `linearize.swap.mixer_specs`."""
        described = {"mixers": [self.mixer], "layers": [None if x.mixer is None else 0 for x in self.layers]}
        return described if self.kept == AS_IN_SOURCE else {**described, "kept": dataclasses.asdict(self.kept)}

    @property
    def new_parameters(self) -> int:
        """Parameters that the swap adds."""
        return sum(torch.Size(t.shape).numel() for layer in self.layers for t in layer.new)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of one sequence's cache after `tokens` tokens."""
        return sum(x.state_bytes if x.mixer is not None else x.kv_bytes(tokens) for x in self.layers)

    def before_choice(self) -> str:
        """What is known while a selector has yet to choose the layers; the plan is printed once it has."""
        kept = sum(layer.mixer is None for layer in self.layers)
        which = f"{self.chooser} chooses which, on the loaded model; the plan follows"
        return "\n".join(
            [self._source(), f"layers      {kept} of {len(self.layers)} keep softmax: {which}", *self._choice()]
        )

    def _choice(self) -> list[str]:
        """The line on what choosing layers costs, where anything is known of it."""
        return [f"            in {self.choice}"] if self.choice else []

    def _source(self) -> str:
        parameters = f"{self.source_parameters / 1e6:,.1f}M parameters"
        return f"source      {self.source} ({self.family}, {parameters}, {self.dtype})"

    def __str__(self) -> str:
        swapped = [layer for layer in self.layers if layer.mixer is not None]
        pattern = "".join("S" if layer.mixer is None else "L" for layer in self.layers)
        if self.chooser is not None:
            pattern += f", for example: {self.chooser} chooses which, on the loaded model"
        lines = [
            self._source(),
            f"mixer       {_written(self.mixer)}",
            f"layers      {len(swapped)} of {len(self.layers)} swapped: {pattern}",
            *self._choice(),
            *([] if self.kept == AS_IN_SOURCE else [f"kept        {self.kept}"]),
            f"new         {self.new_parameters / 1e6:,.3f}M parameters; every tensor of the source keeps its name",
        ]
        if swapped:
            prefix = swapped[0].module
            lines += [f"            {prefix}.{t.name} {list(t.shape)}, {t.init}" for t in swapped[0].new]
            if len(swapped) > 1 and swapped[0].new:
                lines.append(f"            and the same in the other {len(swapped) - 1} swapped layers")
        for tokens in (2048, 32768, 131072) if self.causal else ():
            before = sum(layer.kv_bytes(tokens) for layer in self.layers)
            after = self.cache_bytes(tokens)
            lines.append(
                f"cache       {tokens:>7,} tokens: {before / 2**20:,.1f} MiB -> {after / 2**20:,.1f} MiB a sequence"
            )
        weights = (self.source_parameters + self.new_parameters) * torch.finfo(getattr(torch, self.dtype)).bits // 8
        lines.append(f"memory      weights {weights / 2**30:,.2f} GiB; trained tensors need 16 bytes a parameter more")
        if self.native is not None:
            lines.append(f"export      as {self.native} of transformers; loads without trust_remote_code")
        lines += [f"note        {concern}" for concern in self.concerns]
        return "\n".join(lines)


def _written(settings: dict[str, Any]) -> str:
    """A mixer's settings, or a part's, as `name(key=value, ...)`; what is switched off (0, none, null) is left out."""
    off = (0, None, False, "none")
    shown = {k: _written(v) if isinstance(v, dict) else v for k, v in settings.items() if k != "type"}
    inner = ", ".join(f"{k}={v}" for k, v in shown.items() if v not in off and v != "")
    return f"{settings.get('type', '')}({inner})" if inner else settings.get("type", "")


def make_plan(recipe: Recipe, config: Any) -> Plan:
    """Work out the conversion of a model with configuration `config`.

    Args:
        recipe: a validated recipe.
        config: the model's Hugging Face configuration; its `model_type` names the family.

    Raises:
        UserError: for an unsupported family, a layer pattern or number that does not fit, mixer settings that the layer
            sizes do not allow, stages that cannot follow each other, or a native export of what is no architecture of
            transformers.
    """
    if getattr(config, "linearize", None) is not None:
        raise UserError(f"{recipe.model.name} is a converted model already; convert the model that it was made from")
    family = family_of(config)
    depth = config.get_text_config().num_hidden_layers
    if (selector := recipe.selector(family)) is None:
        assert not isinstance(recipe.layers, dict)
        chosen = choose_layers(recipe.layers, depth)
    else:
        selector.check(config, recipe.data.seq_len)
        chosen = set(range(depth)).difference(selector.provisional(config))
    _check_stages(recipe)
    mixer_class = find("mixers", recipe.mixer["type"], Mixer)
    settings = mixer_config(recipe.mixer)
    dtype = _dtype(recipe.model.dtype, config)

    @cache
    def added(shape: HeadShape) -> tuple[tuple[NewTensor, ...], int, tuple[str, ...]]:
        """New tensors, bytes of the state and branches of a layer of this shape; many are of one."""
        with without_values(dtype):
            mixer = build_mixer(mixer_class, on_torch(settings), shape)
            held = state_bytes(mixer, shape, dtype)
        inits = mixer.inits()
        new = (NewTensor(f"mixer.{n}", tuple(p.shape), str(inits[n])) for n, p in mixer.named_parameters())
        return tuple(new), held, mixer.branches

    layers = []
    branches: tuple[str, ...] = ()
    with torch.device("meta"):
        skeleton = family.model_class(config)
    source_parameters = sum(p.numel() for p in skeleton.parameters())
    kept = _kept(recipe, family, skeleton, chosen)
    for index, module in enumerate(family.attentions(skeleton)):
        shape = family.shape(config, index)
        kv = shape.kv_heads * (shape.key_dim + shape.value_dim) * dtype.itemsize
        if index not in chosen:
            layers.append(LayerPlan(index, module, None, kv_bytes_per_token=kv, reach=shape.reach))
            continue
        try:
            new, held, branches = added(shape)
        except ValueError as error:
            raise UserError(f"mixer {recipe.mixer['type']!r} cannot serve layer {index}: {error}") from error
        layers.append(LayerPlan(index, module, recipe.mixer["type"], new, held, kv, shape.reach))
    plan = Plan(
        family=config.model_type,
        source=recipe.resolved_model(),
        mixer={"type": recipe.mixer["type"], **dataclasses.asdict(settings)},
        layers=tuple(layers),
        source_parameters=source_parameters,
        concerns=(*family.concerns(config, chosen), *untaught(config, _lengths(recipe))),
        dtype=str(dtype).removeprefix("torch."),
        kept=kept,
        causal=family.causal,
        branches=branches,
        chooser=None if selector is None else selector.config.type,
        choice="" if selector is None else selector.cost(config, recipe.data.seq_len),
    )
    if not recipe.export.native:
        return plan
    native = native_of(native_config(config, plan.description()))
    return dataclasses.replace(plan, native=native.model_class.config_class.model_type)  # type: ignore[attr-defined]


def choose_layers(layers: str | list[int], depth: int) -> set[int]:
    """The numbers of the layers to swap.

    Args:
        layers: "all", a pattern of L and S whose length divides `depth`, or layer numbers.
        depth: layers of the model.

    Raises:
        UserError: when it does not fit the depth, chooses nothing, or names a layer twice.
    """
    if isinstance(layers, list):
        outside = [i for i in layers if not 0 <= i < depth]
        if outside:
            raise UserError(f"layers: {outside} not in this model; it has layers 0 to {depth - 1}")
        chosen = set(layers)
        if len(chosen) < len(layers):
            repeated = sorted({i for i in layers if layers.count(i) > 1})
            raise UserError(f"layers: {repeated} more than once in {layers}; name each layer to swap once")
    elif layers == "all":
        chosen = set(range(depth))
    else:
        wrong = sorted(set(layers) - set("LS"))
        if wrong or not layers:
            raise UserError(f"layers: {layers!r} is neither 'all' nor a pattern of L (swap) and S (keep softmax)")
        if depth % len(layers):
            fits = ", ".join(str(n) for n in range(1, depth + 1) if depth % n == 0)
            raise UserError(
                f"layers: pattern {layers!r} has {len(layers)} letters and does not repeat evenly over {depth} layers; "
                f"lengths that fit: {fits}; or let a selector find the layers: "
                "layers={type: window_ablation, keep: 0.25}"
            )
        chosen = {i for i in range(depth) if layers[i % len(layers)] == "L"}
    if not chosen:
        raise UserError(f"layers: {layers!r} swaps no layer; put an L in the pattern, or use 'all'")
    return chosen


def _kept(recipe: Recipe, family: type[Family], model: Any, chosen: set[int]) -> Kept:
    """What the recipe's `kept` section asks for, where it can be had."""
    kept, attentions = Kept(**recipe.kept.model_dump()), family.attentions(model)
    if kept == AS_IN_SOURCE:
        return kept
    if len(chosen) == len(attentions):
        raise UserError(
            f"kept ({kept}) changes layers that keep their softmax attention, but layers: {recipe.layers!r} keeps "
            "none; keep some with a pattern such as LLLS, or leave kept out"
        )
    if not kept.rope and family.rotary is None:
        raise UserError(
            f"kept.rope: false takes the rotary embedding from kept layers, and a {model.config.model_type} model has "
            "none; leave it true"
        )
    if kept.log_scale is not None and not family.tells_positions:
        raise UserError(
            f"kept.log_scale needs to know where a token stands, and attention of {model.config.model_type} models is "
            "not told; leave it null"
        )
    return kept


def _check_stages(recipe: Recipe) -> None:
    last = recipe.stages[-1].get("lora") if recipe.stages else None
    if recipe.export.native and last and not last["merge"]:
        raise UserError(
            f"export.native writes one model, and stages.{len(recipe.stages) - 1}.lora.merge is false; set it to true, "
            "or leave export.native out"
        )
    for index, stage in enumerate(recipe.stages[:-1]):
        lora = stage.get("lora")
        if lora and not lora["merge"]:
            raise UserError(
                f"stages.{index}.lora.merge is false, but only the last stage can leave its adapter unmerged"
            )


def _lengths(recipe: Recipe) -> set[int]:
    """Tokens of training rows, but for stages with a policy for `positions`, which are there to go beyond them."""
    trains = [stage for stage in recipe.stages if "tokens" in stage and "positions" not in stage]
    return {recipe.stage_data(stage).seq_len for stage in trains}


def _dtype(wanted: str, config: Any) -> torch.dtype:
    if wanted != "auto":
        return getattr(torch, wanted)
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
