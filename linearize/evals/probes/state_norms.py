"""How large the recurrent states are as text goes by, and how much of them is used.

The root mean square of each mixer's state after 64, 128, 256, ... tokens, up to four times the training length, read
from the cache after chunked prefill; and the effective rank of the last state, exp of the entropy of its singular
values' shares (Roy & Vetterli 2007). A state that keeps growing leaves the range that the layers above were trained on:
growth is the exponent of length over the last doubling, 0 for a state that has settled, 0.5 for a sum of independent
terms, 1 for a sum of like ones. A mixer that divides by the sum of its weights has such a sum by design, and its
read-out does not grow with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from linearize.arguments import cache_of, continued
from linearize.evals.probes.base import Probe, ProbeConfig, Rows, Subject, layer_bars
from linearize.evals.text import doubling_edges
from linearize.evals.views import Lines, View
from linearize.hf.cache import state_layer
from linearize.swap import swapped

FAR = 1.5
"""How many times as long the text is at the end as where its growth is taken from, at least."""


class StateNormsConfig(ProbeConfig):
    """Settings."""

    times: PositiveInt = Field(4, description="Longest length, in training lengths.")
    windows: PositiveInt = Field(4, description="Windows of text of that length, evenly spaced over it.")
    growth: PositiveFloat = Field(
        0.2, description="Exponent of the length above which a state counts as growing at the end."
    )


class StateNorms(Probe):
    """Over all matrices of a layer's state, `linearize.mixers.base.Mixer.matrices`, and all windows."""

    Config = StateNormsConfig
    needs_mixers = True

    def rows(self, seq_len: int) -> Rows:
        """The windows."""
        return [(self.config.windows, self.config.times * seq_len)]

    def run(self, subject: Subject) -> dict[str, Any]:
        """`{"seq_len", "length", "layers": [{"layer", "points": [{"tokens", "rms"}], "growth", "rank", "full_rank"}],
        "notes"}`: rms None where it is not finite, growth None where it cannot be taken, rank the mean effective rank
        of the matrices after the last token and None where one is not finite.
        """
        model = subject.model
        length, notes = subject.fitting(self.config.times * subject.seq_len)
        points = doubling_edges(length)[1:]
        layers = swapped(model).values()
        family = next(iter(layers)).family
        squares = {int(attn.layer_idx): torch.zeros(len(points), dtype=torch.float64) for attn in layers}  # type: ignore
        ranks: dict[int, list[torch.Tensor]] = {layer: [] for layer in squares}
        sizes = {}
        windows = 0
        for ids in subject.batches(length, self.config.windows):
            cache = None
            for at, (first, end) in enumerate(pairwise([0, *points])):
                cache = cache_of(continued(family.base_model(model), cache, input_ids=ids[:, first:end]))
                for layer, attn in zip(squares, layers, strict=True):
                    held = [m.double() for m in attn.mixer.matrices(state_layer(cache, layer).state)]
                    if held:
                        entries = sum(m[0].numel() for m in held)
                        squares[layer][at] += sum(float(m.square().sum()) for m in held) / entries
                        sizes[layer] = sum(m.shape[1] * min(m.shape[2:]) for m in held) / sum(m.shape[1] for m in held)
                        if end == length:
                            ranks[layer] += [rank for m in held for rank in effective_rank(m)]
            windows += len(ids)
        found = [
            self._layer(layer, points, (squares[layer] / windows).sqrt(), torch.cat(ranks[layer]), full)
            for layer, full in sizes.items()
        ]
        return {"seq_len": subject.seq_len, "length": length, "layers": found, "notes": notes + self._notes(found)}

    @staticmethod
    def _layer(layer: int, points: list[int], rms: torch.Tensor, ranks: torch.Tensor, full: float) -> dict[str, Any]:
        values = [float(value) if value.isfinite() else None for value in rms]
        growth, last = None, values[-1]
        before = [at for at, n in enumerate(points) if FAR * n <= points[-1]]  # the last two may be one token apart
        if before and last and (first := values[before[-1]]):
            growth = math.log(last / first) / math.log(points[-1] / points[before[-1]])
        return {
            "layer": layer,
            "points": [{"tokens": n, "rms": value} for n, value in zip(points, values, strict=True)],
            "growth": growth,
            "rank": float(ranks.mean()) if ranks.isfinite().all() else None,
            "full_rank": full,
        }

    def _notes(self, found: list[dict[str, Any]]) -> list[str]:
        broken = [at["layer"] for at in found if any(point["rms"] is None for point in at["points"])]
        growing = [at for at in found if (at["growth"] or 0.0) > self.config.growth]
        if not found:
            return ["no mixer says which matrices its state holds (`Mixer.matrices`)"]
        notes = [f"the state is not finite in layers {', '.join(map(str, broken))}"] if broken else []
        if growing:
            fastest = max(growing, key=lambda at: at["growth"])
            names = ", ".join(str(at["layer"]) for at in growing)
            notes.append(
                f"the state still grows after {fastest['points'][-1]['tokens']} tokens in layers {names}, fastest in "
                f"{fastest['layer']}, with the length to the power of {fastest['growth']:.2f} (threshold "
                f"{self.config.growth:g})"
            )
        return notes

    @classmethod
    def views(cls, results: Mapping[str, dict[str, Any]]) -> Sequence[View]:
        """A curve for each layer, for each model; ranks and growth as bars."""
        curves: list[View] = [
            Lines(
                f"Size of the states: {name}",
                "A curve that goes on rising at its end belongs to a state without bound.",
                x_label="tokens read",
                y_label="root mean square",
                series={
                    f"layer {at['layer']}": [(p["tokens"], p["rms"]) for p in at["points"] if p["rms"] is not None]
                    for at in found["layers"]
                },
                log_x=True,
            )
            for name, found in results.items()
        ]
        return [
            *curves,
            layer_bars(
                "Growth of the states at the end",
                "exponent of the length",
                results,
                lambda at: at["growth"],
                "Over the last doubling: 0 has settled, 0.5 is a sum of independent terms, 1 a sum of like ones.",
            ),
            layer_bars(
                "Effective rank of the states",
                "share of the full rank",
                results,
                lambda at: None if at["rank"] is None else at["rank"] / at["full_rank"],
                "After the last token. Near 0, a state holds little more than one direction, however large it is.",
            ),
        ]


def effective_rank(matrices: torch.Tensor) -> torch.Tensor:
    """exp(-sum p log p) of the shares p of the singular values: [B, N, F, V] -> [B, N]; 0 for zeros, NaN where not all
    entries are finite.
    """
    finite = matrices.isfinite().all(-1).all(-1)
    values = torch.linalg.svdvals(torch.where(finite[..., None, None], matrices, 0.0))
    total = values.sum(-1, keepdim=True)
    share = values / total.clamp_min(torch.finfo(values.dtype).tiny)
    rank = torch.where(total[..., 0] > 0, torch.special.entr(share).sum(-1).exp(), 0.0)
    return torch.where(finite, rank, math.nan).cpu()
