"""What the gates of mixers do on real text: how fast states forget, what is written, and which branch speaks.

Read from the parts of the mixers while the student reads text: every decay (half-life in tokens = ln 2 / -log decay,
per head over tokens and channels), the write strength of delta rules, and where a softmax window is combined with a
recurrent branch, the window's factor and its share of the output by size. The last two are taken where a query has
tokens behind its window alone. What a mixer does not have is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import nn

from linearize.evals.probes.base import Probe, ProbeConfig, Rows, Subject, layer_bars
from linearize.evals.views import HeatMap, Lines, Number, Table, View
from linearize.mixers.parts.combines.base import Combine
from linearize.mixers.parts.decays.base import Decay
from linearize.mixers.parts.updates.base import WriteStrength
from linearize.schema import Count
from linearize.swap import swapped

LOWEST, HIGHEST = -4, 20
"""Base-2 logarithms of the half-lives in tokens that are told apart; what lies beyond is counted at the end."""
BINS = 384
"""Of the logarithm, 16 to an octave."""


class GatesConfig(ProbeConfig):
    """Settings."""

    length: Count | None = Field(None, gt=0, description="Tokens per window. Default: the training length.")
    windows: PositiveInt = Field(8, description="Windows of text, evenly spaced over it.")


class Gates(Probe):
    """Half-lives above 2^20 tokens count as 2^20, and below 2^-4 as 2^-4."""

    Config = GatesConfig
    needs_mixers = True

    def rows(self, seq_len: int) -> Rows:
        """The windows."""
        return [(self.config.windows, self.config.length or seq_len)]

    def run(self, subject: Subject) -> dict[str, Any]:
        """`{"tokens", "layers": [...], "lives": [[half-life, share]], "notes"}`.

        A layer is `{"layer", "decay", "write", "window"}`, each None where it has none. decay: a list of
        `{"low", "median", "high", "mean"}` per head in tokens: quantiles 0.1, 0.5 and 0.9 over tokens and channels, and
        that of a channel's mean log-decay, the median over channels. write: mean write strength per head. window: a
        list of `{"weight", "size"}` per head, means of the window's factor and of its share |w| / (|w| + |r|) of the
        output, w and r being what window and recurrent branch add to it. lives: the share of all decays with at least
        that half-life.
        """
        length, notes = subject.fitting(self.config.length or subject.seq_len)
        layers = {int(attn.layer_idx): attn.mixer for attn in swapped(subject.model).values()}  # type: ignore[arg-type]
        found = {layer: _Layer(mixer.exact) for layer, mixer in layers.items()}
        tokens = 0
        with _watching({layers[n]: seen for n, seen in found.items()}):
            for ids in subject.batches(length, self.config.windows):
                subject.model(input_ids=ids, use_cache=False)
                tokens += ids.numel()
        hidden = [n for n, mixer in layers.items() if mixer.exact >= length and not found[n].window]
        if hidden and any(seen.combined for seen in found.values()):
            notes.append(f"windows of {length} tokens show nothing behind the mixers' own; set `length` higher")
        counts = sum((seen.lives.sum(0) for seen in found.values() if seen.lives is not None), torch.zeros(BINS))
        result = [{"layer": n, **seen.result()} for n, seen in found.items()]
        return {"tokens": tokens, "layers": result, "lives": _survival(counts), "notes": notes}

    @classmethod
    def views(cls, results: Mapping[str, dict[str, Any]]) -> Sequence[View]:
        """Half-lives over all, by layer and head; the window's share by layer; a table."""
        views: list[View] = []
        lives = {name: [(n, share) for n, share in found["lives"]] for name, found in results.items() if found["lives"]}
        if lives:
            views.append(
                Lines(
                    "How long states remember",
                    "Decays of all layers, heads, channels and tokens.",
                    x_label="half-life (tokens, at least)",
                    y_label="share of decays",
                    series=lives,
                    log_x=True,
                )
            )
        views += [map for name, found in results.items() if (map := _heat_map(name, found))]
        if any(at["window"] for found in results.values() for at in found["layers"]):
            views.append(
                layer_bars(
                    "Share of the window in the output",
                    "share by size",
                    results,
                    lambda at: _mean(at["window"], "size"),
                    "Where a query has tokens behind its window. At 1 the recurrent branch says nothing.",
                )
            )
        return [*views, _table(results)]

    @classmethod
    def summary(cls, results: Mapping[str, dict[str, Any]]) -> Sequence[View]:
        """All but the single heads."""
        return [view for view in cls.views(results) if not isinstance(view, HeatMap)]


class _Layer:
    """What was seen of one layer's mixer, as sums that do not depend on batches."""

    def __init__(self, exact: int):
        self.exact = exact
        self.lives: torch.Tensor | None = None  # [H, BINS] counts
        self.logs: torch.Tensor | None = None  # [H, F] sum of -log decay
        self.decays = 0
        self.writes: torch.Tensor | None = None  # [H] sum
        self.written = 0
        self.window: torch.Tensor | None = None  # [2, H] sums of weight and size
        self.joined = 0
        self.combined = False

    def decay(self, part: Decay, args: tuple, gate: Any) -> None:
        if gate.log_decay is None:
            return
        rate = -gate.log_decay.double()
        rate = rate.unsqueeze(-1) if rate.ndim == 3 else rate  # [B, T, H, F]
        life = (math.log(2) / rate.clamp_min(1e-12)).log2()
        place = ((life - LOWEST) * (BINS / (HIGHEST - LOWEST))).long().clamp(0, BINS - 1)
        heads = place.movedim(2, 0).flatten(1)
        counts = torch.zeros(len(heads), BINS, dtype=torch.float64, device=place.device)
        counts.scatter_add_(1, heads, torch.ones_like(heads, dtype=torch.float64))
        self.lives = counts.cpu() + (0 if self.lives is None else self.lives)
        self.logs = rate.sum((0, 1)).cpu() + (0 if self.logs is None else self.logs)
        self.decays += rate.shape[:2].numel()

    def write(self, part: WriteStrength, args: tuple, strength: torch.Tensor) -> None:
        self.writes = strength.double().sum((0, 1)).cpu() + (0 if self.writes is None else self.writes)
        self.written += strength.shape[:2].numel()

    def combine(self, part: Combine, args: tuple, out: torch.Tensor) -> None:
        window, memory, x = args
        weight = part.window_weight(window, memory, x)
        if weight is None:
            return
        self.combined = True
        near = weight.double().unsqueeze(-1) * window.out.double()
        size, rest = near.norm(dim=-1), (out.double() - near).norm(dim=-1)
        share = size / (size + rest).clamp_min(1e-30)
        seen = torch.stack([weight.double(), share])[:, :, self.exact :]  # [2, B, T', H]
        if seen.shape[2]:
            self.window = seen.sum((1, 2)).cpu() + (0 if self.window is None else self.window)
            self.joined += seen.shape[1:3].numel()

    def result(self) -> dict[str, Any]:
        decay, window = None, None
        if self.lives is not None and self.logs is not None:
            means = (math.log(2) / (self.logs / self.decays).clamp_min(1e-12)).clamp(2.0**LOWEST, 2.0**HIGHEST)
            quantiles = [_quantiles(counts) for counts in self.lives]
            decay = [
                {"low": low, "median": median, "high": high, "mean": float(mean.quantile(0.5))}
                for (low, median, high), mean in zip(quantiles, means, strict=True)
            ]
        if self.window is not None:
            window = [{"weight": w, "size": s} for w, s in (self.window / self.joined).T.tolist()]
        write = None if self.writes is None else (self.writes / self.written).tolist()
        return {"decay": decay, "write": write, "window": window}


@contextmanager
def _watching(seen: Mapping[nn.Module, _Layer]) -> Iterator[None]:
    """Inside the context the parts of these mixers tell what they return."""
    hooks = []
    for mixer, layer in seen.items():
        kinds: list[tuple[type[nn.Module], Callable]] = [
            (Decay, layer.decay),
            (WriteStrength, layer.write),
            (Combine, layer.combine),
        ]
        for module in mixer.modules():
            hooks += [module.register_forward_hook(see) for kind, see in kinds if isinstance(module, kind)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _life(bins: float) -> float:
    """The half-life at the lower end of bin `bins`."""
    return 2.0 ** (LOWEST + bins * (HIGHEST - LOWEST) / BINS)


def _quantiles(counts: torch.Tensor) -> list[float]:
    """Half-lives at the quantiles 0.1, 0.5 and 0.9 of counts [BINS], interpolated within a bin."""
    below = counts.cumsum(0)
    lives = []
    for q in (0.1, 0.5, 0.9):
        target = q * float(below[-1])
        at = int(torch.searchsorted(below, target))
        inside = (target - float(below[at] - counts[at])) / float(counts[at])
        lives.append(_life(at + inside))
    return lives


def _survival(counts: torch.Tensor) -> list[list[float]]:
    """[[half-life, share of decays with at least that]] at every half octave where anything changes."""
    total = float(counts.sum())
    if not total:
        return []
    shares = [(_life(at), float(counts[at:].sum()) / total) for at in range(0, BINS + 1, 8)]
    first = max((i for i, (_, share) in enumerate(shares) if share == 1.0), default=0)
    last = next(i for i, (_, share) in enumerate(shares) if share == 0.0)
    return [[life, share] for life, share in shares[first : last + 1]]


def _mean(heads: Sequence[dict[str, float]] | None, key: str) -> Number:
    return None if heads is None else sum(head[key] for head in heads) / len(heads)


def _heat_map(name: str, found: dict[str, Any]) -> HeatMap | None:
    rows = {at["layer"]: [math.log2(head["mean"]) for head in at["decay"]] for at in found["layers"] if at["decay"]}
    if not rows:
        return None
    heads = max(map(len, rows.values()))
    return HeatMap(
        f"Half-life by layer and head: {name}",
        "Base-2 logarithm of tokens: 6 is 64 tokens, 10 is 1,024.",
        x_label="head",
        y_label="layer",
        x=[str(head) for head in range(heads)],
        y=[str(layer) for layer in rows],
        values=[[*row, *[None] * (heads - len(row))] for row in rows.values()],
        low=min(0.0, *(value for row in rows.values() for value in row)),
        high=max(12.0, *(value for row in rows.values() for value in row)),
    )


def _table(results: Mapping[str, dict[str, Any]]) -> Table:
    """A row for each layer; numbers are means over heads, half-lives geometric ones."""

    def life(at: dict[str, Any], key: str) -> Number:
        heads = at["decay"]
        return None if heads is None else math.exp(sum(math.log(head[key]) for head in heads) / len(heads))

    rows: list[list[str | Number]] = [
        [
            name,
            str(at["layer"]),
            *(life(at, key) for key in ("low", "median", "high")),
            None if at["write"] is None else sum(at["write"]) / len(at["write"]),
            _mean(at["window"], "weight"),
            _mean(at["window"], "size"),
        ]
        for name, found in results.items()
        for at in found["layers"]
    ]
    lives = ["half-life, 10%", "50%", "90% (tokens)"]
    return Table(
        "Gates by layer",
        "Means over heads.",
        columns=["", "layer", *lives, "write strength", "window's factor", "window's share by size"],
        rows=rows,
    )
