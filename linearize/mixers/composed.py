"""Any mixer that its parts describe: feature map x decay x update x window x combination x positions x output.

    k', v', q' = conv(k, v, q)                 optional short convolution, then an optional norm
    S_t = update(decay S_{t-1}, phi_k(k'), v')  the recurrent branch, read with phi_q(q')
    y_t = combine(window attention, output(read-out))

Every published method that fits the scheme is this mixer with other defaults, in a file of its own; a recipe that names
`composed` makes a new one without code.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from linearize.inits.base import Constant, Init
from linearize.mixers.base import Backend, Context, HeadShape, Mixer, State
from linearize.mixers.parts.base import Calibration, build, calibrate_parts, part, part_inits
from linearize.mixers.parts.combines.base import Combine, Memory
from linearize.mixers.parts.combines.sum import SumConfig
from linearize.mixers.parts.conv import Conv, ConvConfig
from linearize.mixers.parts.decays.base import Decay, Gate
from linearize.mixers.parts.decays.none import NoneConfig
from linearize.mixers.parts.feature_maps.base import FeatureMap
from linearize.mixers.parts.feature_maps.identity import IdentityConfig
from linearize.mixers.parts.output import Output, OutputConfig
from linearize.mixers.parts.updates.additive import AdditiveConfig
from linearize.mixers.parts.updates.base import Update, unit
from linearize.mixers.parts.window import LocalWindow
from linearize.ops.layout import expand_heads, rms_normed
from linearize.ops.linear import normalized
from linearize.ops.window import leaving


@dataclass(frozen=True)
class ComposedConfig:
    """Settings of a composed mixer."""

    __pydantic_config__ = {"extra": "forbid"}

    feature_map: Any = part("feature_maps", IdentityConfig)
    """phi, of queries and of keys, each with parameters of its own."""
    decay: Any = part("decays", NoneConfig)
    """How the recurrent state forgets."""
    update: Any = part("updates", AdditiveConfig)
    """How tokens are written into the recurrent state."""
    normalize: bool = False
    """Whether the read-out is divided by the sum of its weights."""
    scale: Literal["none", "sqrt"] = "none"
    """Factor on queries of the recurrent branch: 1, or 1 / sqrt of the number of features."""
    window: int = 0
    """Tokens of exact softmax attention, the current one included; 0 for no window."""
    sinks: int = 0
    """First tokens of a document that stay in the softmax at any distance."""
    meta_tokens: int = 0
    """Learned keys and values that the softmax sees at every position."""
    combine: Any = part("combines", SumConfig)
    """How window and recurrent branch become one output."""
    rope: Literal["both", "window", "recurrent", "features", "none"] = "both"
    """Which branches see the rotary embedding; features: the recurrent one, after its map. Without it the recurrent
    branch works at lengths it was not trained on."""
    conv: ConvConfig = field(default_factory=ConvConfig)
    """Short convolution on the projected heads."""
    source_norm: bool = True
    """Whether queries and keys pass the source's own q/k norm, where it has one, before the mixer (its gates included)
    sees them."""
    qk_norm: Literal["none", "l2", "rms"] = "none"
    """Norm of queries and keys per head: l2 after the feature map, or a learned RMS norm before it."""
    kv_heads: Literal["shared", "cloned"] = "shared"
    """Cloned gives each query head keys and values of its own: the group's plus a learned projection, zero at first."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """What follows the recurrent read-out."""
    skip: bool = False
    """Whether the current token's value is added to the recurrent read-out, times a learned factor per head, 0 at
    first.
    """
    chunk_size: int = 64
    """Tokens per chunk of the parallel form; changes speed, not results."""
    backend: Backend = "auto"
    """Which implementation of the recurrence runs; auto takes the fla kernels on GPUs that have them."""

    def __post_init__(self) -> None:
        for name in ("window", "sinks", "meta_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more tokens, got {getattr(self, name)}")
            if getattr(self, name) and not self.window:
                raise ValueError(f"{name} needs a window; set window to at least 1 token")
        if self.combine.part.shares_denominator and not self.window:
            raise ValueError(f"combine {self.combine.type!r} needs a window; set window to at least 1 token")


class Composed(Mixer):
    """See the module docstring. State: the window's ring, the convolution's last tokens and the update's own."""

    Config: ClassVar[type] = ComposedConfig

    def __init__(self, config: Any, shape: HeadShape):
        super().__init__(config, shape)
        self.map_q: FeatureMap = build(config.feature_map, shape)
        self.map_k: FeatureMap = build(config.feature_map, shape)
        inner = dataclasses.replace(shape, key_dim=self.map_q.features)
        self.update: Update = build(config.update, inner)
        self.decay: Decay = build(config.decay, dataclasses.replace(shape, key_dim=self.update.decay_channels()))
        self.output = Output(config.output, shape)
        kv_heads = shape.heads if config.kv_heads == "cloned" else shape.kv_heads
        convolved = dataclasses.replace(shape, kv_heads=kv_heads)
        self.conv = Conv(config.conv, convolved, config.backend) if config.conv.size else None
        self.local = LocalWindow(config.window, config.sinks, config.meta_tokens, shape) if config.window else None
        self.combine: Combine | None = build(config.combine, shape) if config.window else None
        if config.qk_norm == "rms":
            self.q_norm, self.k_norm = (nn.Parameter(torch.empty(shape.key_dim)) for _ in range(2))
        if config.kv_heads == "cloned":
            self.clone_k = nn.Parameter(torch.empty(shape.heads, shape.key_dim, shape.hidden_size))
            self.clone_v = nn.Parameter(torch.empty(shape.heads, shape.value_dim, shape.hidden_size))
        if config.skip:
            self.skip = nn.Parameter(torch.empty(shape.heads))
        self.branches = ("window", "linear") if config.window else ()  # type: ignore[misc]
        self._check()

    def _check(self) -> None:
        config, decay = self.config, self.decay.granularity
        if decay not in self.update.decays:
            raise ValueError(
                f"update {config.update.type!r} takes decays per {' or '.join(self.update.decays)}, "
                f"and decay {config.decay.type!r} is per {decay}"
            )
        if (config.normalize or self.exclusive) and not (self.map_q.non_negative and self.update.normalizes):
            raise ValueError(
                "a denominator needs weights that are never negative, which feature_map "
                f"{config.feature_map.type!r} with update {config.update.type!r} does not give; take a map such as "
                "hedgehog, and update additive"
            )
        if self.exclusive and (config.output != OutputConfig() or config.skip):
            raise ValueError(
                f"combine {config.combine.type!r} needs the recurrent branch as it is; leave out output and skip"
            )
        if config.rope == "features" and (self.map_q.features != self.shape.key_dim or self.exclusive):
            raise ValueError(
                f"rope: features turns vectors of {self.shape.key_dim} channels, and feature_map "
                f"{config.feature_map.type!r} gives {self.map_q.features}; give it as many, or choose another rope"
            )
        if self.exclusive and decay != "none":
            raise ValueError(
                f"combine {config.combine.type!r} weighs every token before the window alike; "
                f"it cannot have decay {config.decay.type!r}"
            )

    @property
    def exclusive(self) -> bool:
        """Whether the recurrent branch holds only what has left the window."""
        return self.combine is not None and self.combine.shares_denominator

    def inits(self) -> dict[str, Init]:
        norms = {name: Constant(1.0) for name in ("q_norm", "k_norm")} if self.config.qk_norm == "rms" else {}
        clones = {name: Constant(0.0) for name in ("clone_k", "clone_v")} if self.config.kv_heads == "cloned" else {}
        skip = {"skip": Constant(0.0)} if self.config.skip else {}
        return {**part_inits(self), **norms, **clones, **skip}

    @property
    def bidirectional(self) -> bool:
        plain = self.decay.granularity == "none" and self.conv is None and self.local is None
        return plain and self.update.bidirectional

    @property
    def linear_in_values(self) -> bool:
        output, config = self.config.output, self.config
        plain = output.norm == "none" and config.kv_heads == "shared" and not config.meta_tokens
        plain = plain and not (config.conv.size and "v" in config.conv.inputs)
        return self.update.linear_in_values and (plain or self.bare)

    @property
    def source_norm(self) -> bool:
        return self.config.source_norm

    @property
    def output_scale(self) -> nn.Parameter | None:
        return self.output.scale if self.config.output.scale else None

    @property
    def exact(self) -> int:
        return self.config.window

    def matrices(self, state: State) -> tuple[torch.Tensor, ...]:
        return self.update.matrices(state["linear"])

    def calibrate(self, measured: Calibration) -> None:
        """Set what the parts can set from the teacher's attention."""
        calibrate_parts(self, measured)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        x: torch.Tensor,
        ctx: Context,
        state: State | None = None,
    ) -> tuple[torch.Tensor, State]:
        past, after = state or {}, {}
        dtype = v.dtype
        if self.config.kv_heads == "cloned":
            k = expand_heads(k, self.shape.heads) + _project(x, self.clone_k)
            v = v if self.bare else expand_heads(v, self.shape.heads) + _project(x, self.clone_v)
        if self.conv is not None:
            q, k, v, after["conv"] = self.conv(q, k, v, ctx, past.get("conv"), self.bare)
        if self.config.qk_norm == "rms":
            q, k = (rms_normed(t, norm, 1e-6).to(t.dtype) for t, norm in ((q, self.q_norm), (k, self.k_norm)))
        gate = self.decay(x, k)
        q_turned, k_turned = (q, k) if self.config.rope == "none" else ctx.rotary(q, k)
        bare_q, bare_k = (q_turned, k_turned) if self.config.rope in ("both", "recurrent") else (q, k)
        window, memory_k, memory_v = None, bare_k, v
        valid: torch.Tensor | None = None
        if self.local is not None:
            turned = self.config.rope in ("both", "window")
            q_local, k_local = (q_turned, k_turned) if turned else (q, k)
            # The ring holds the window's keys; where the recurrent branch reads others, they travel beside the values.
            carried = v if not self.exclusive or k_local is bare_k else torch.cat([v, bare_k.to(v.dtype)], dim=-1)
            if self.exclusive:
                memory_k, memory_v, valid = self._leaving(k_local, carried, v.shape[-1], ctx, past.get("window"))
            window, after["window"] = self.local(q_local, k_local, carried, ctx, past.get("window"), q, self.bare)
            window = window._replace(out=window.out[..., : v.shape[-1]])
        memory, after["linear"] = self._recur(bare_q, memory_k, memory_v, valid, gate, x, ctx, past.get("linear"))
        return self._join(window, memory, x).to(dtype), after

    def _leaving(
        self, k: torch.Tensor, carried: torch.Tensor, size: int, ctx: Context, state: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values [B, T, Hkv, size] and validity [B, T] of the token that leaves the window at each step."""
        assert self.local is not None
        k, carried, valid = leaving(
            k,
            carried,
            window=self.local.window,
            sinks=self.local.sinks,
            mask=ctx.mask,
            documents=ctx.documents,
            state=state,
        )
        return (k if carried.shape[-1] == size else carried[..., size:]), carried[..., :size], valid

    def _recur(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        valid: torch.Tensor | None,
        gate: Gate,
        x: torch.Tensor,
        ctx: Context,
        state: Any,
    ) -> tuple[Memory, Any]:
        """The recurrent branch."""
        phi_q, phi_k = self.map_q(q), self.map_k(expand_heads(k, self.shape.heads) if self.map_k.per_head else k)
        if self.config.rope == "features":
            phi_q, phi_k = ctx.rotary(phi_q, phi_k)
        if self.config.qk_norm == "l2":
            phi_q, phi_k = unit(phi_q), unit(phi_k)
        if valid is not None:
            phi_k = phi_k * valid[:, :, None, None]
        y, den, after = self.update(
            phi_q,
            phi_k,
            v,
            gate,
            x,
            normalize=self.config.normalize or self.exclusive,
            scale=1.0 if self.config.scale == "none" else self.map_q.features**-0.5,
            mask=ctx.mask,
            documents=ctx.documents,
            state=state,
            chunk_size=self.config.chunk_size,
            backend=self.config.backend,
        )
        if self.config.skip and not self.bare:
            own = expand_heads(v, self.shape.heads).to(y.dtype)
            y = y + own * self.skip.to(y.dtype)[:, None]
        return Memory(y, den), after

    def _join(self, window: Any, memory: Memory, x: torch.Tensor) -> torch.Tensor:
        if "linear" in self.disabled:
            return window.out
        alone = window is None or "window" in self.disabled
        if memory.den is not None and (alone or not self.exclusive):
            memory = Memory(normalized(memory.out, memory.den), None)
        memory = memory if self.bare else memory._replace(out=self.output(memory.out, x))
        if alone:
            return memory.out
        assert self.combine is not None
        return self.combine(window, memory, x)


def _project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [B, T, C], weight [H, D, C] -> [B, T, H, D]."""
    return torch.einsum("btc,hdc->bthd", x, weight.to(x.dtype))
