"""Loss by position up to eight times the training length, and whether the model collapses on the way.

Text is not equally hard everywhere, so each token beyond the training length is predicted twice: after everything
before it, and after a short context alone, half the training length to all of it. What the long context adds to the
loss of the same tokens is the rise. A model that is merely not helped by far context rises by 0. A note names a rise
above `threshold`: where a state is to blame, Chen et al. 2024 (Stuffed Mamba, arXiv:2410.07145) call it state collapse;
softmax attention does the same beyond the positions that it was trained on. Where a table of positions or the text ends
earlier, the loss is taken up to there, and a note says why not further.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from linearize.evals.probes.base import DoesNotFit, Probe, ProbeConfig, Rows, Subject
from linearize.evals.text import doubling_edges, position_losses
from linearize.evals.views import Lines, View


class LengthExtrapolationConfig(ProbeConfig):
    """Settings."""

    times: int = Field(8, gt=1, description="Longest length, in training lengths.")
    windows: PositiveInt = Field(8, description="Windows of text of that length, evenly spaced over it.")
    threshold: PositiveFloat = Field(
        0.1, description="Rise of the loss in nats per token, on the same tokens, that counts as a collapse."
    )


class LengthExtrapolation(Probe):
    """Loss and rise in buckets of positions: widths double up to the training length, beyond it each is one of it."""

    Config = LengthExtrapolationConfig
    tells_broken = True

    def rows(self, seq_len: int) -> Rows:
        """The windows."""
        return [(self.config.windows, self.config.times * seq_len)]

    def run(self, subject: Subject) -> dict[str, Any]:
        """`{"seq_len", "length", "ended", "windows", "buckets", "notes"}`. ended: why nothing longer was measured, None
        where `times` was reached. A bucket is `{"first", "end", "loss", "short", "rise", "error"}` for positions first
        <= p < end: nats per token after all tokens and after a short context, the difference and its standard error
        over windows; the last three None up to the training length, the error for one window, and all where they are
        not finite.

        Raises:
            DoesNotFit: when training length or text are too short for any loss.
        """
        short = subject.seq_len
        length, notes = subject.fitting(self.config.times * short)
        ended = "; ".join(notes) if length < self.config.times * short else None
        if min(short, length) < 2:
            raise DoesNotFit(
                f"length_extrapolation predicts tokens from those before, and the training length is {short}, "
                f"the longest window {length}; give a longer text, or leave the probe out"
            )
        if length <= short:
            notes.append(f"nothing beyond the training length of {short} tokens could be measured")
        rows = max(1, subject.batch_size * short // length)  # as many logits at once as at the training length
        full, near = [], []
        for ids in subject.batches(length, self.config.windows, rows):
            full.append(position_losses(subject.model, ids).double().cpu())
            if length > short:
                near.append(short_context_losses(subject.model, ids, short, subject.batch_size).double().cpu())
        long = torch.cat(full)  # [W, L - 1]
        few = torch.cat(near) if near else long[:, :0]  # [W, L - short]
        within = doubling_edges(min(short, length))
        edges = [*within, *range(2 * short, length, short), *([length] if length > short else [])]
        buckets = [_bucket(long, few, a, b, short) for a, b in pairwise(edges)]
        broken = next((b["first"] for b in buckets if b["loss"] is None), None)
        notes += [] if broken is None else [f"the loss is not finite from position {broken} on"]
        collapse = self._collapse(buckets, short)
        notes += [collapse] if collapse else []
        found = {"seq_len": short, "length": length, "ended": ended}
        return {**found, "windows": len(long), "buckets": buckets, "notes": notes}

    def _collapse(self, buckets: list[dict[str, Any]], short: int) -> str | None:
        """What to say of the first bucket whose rise is above the threshold, and above twice its standard error."""
        beyond = [b for b in buckets if b["rise"] is not None]
        worst = max(beyond, key=lambda b: b["rise"], default={})
        for b in beyond:
            if b["rise"] > max(self.config.threshold, 2 * (b["error"] or 0.0)):
                return (
                    f"collapse: from position {b['first']} on the loss is {b['rise']:.2f} nats above that of the "
                    f"same tokens after at most {short} tokens ({worst['rise']:.2f} at worst, from {worst['first']}; "
                    f"training length {short}, threshold {self.config.threshold:g})"
                )
        return None

    @classmethod
    def views(cls, results: Mapping[str, dict[str, Any]]) -> Sequence[View]:
        """Loss over the position, and its rise over that of the same tokens after a short context."""
        lengths = {name: f"{found['seq_len']:,} tokens" for name, found in results.items()}
        same = len(set(lengths.values())) == 1
        told = next(iter(lengths.values())) if same else ", ".join(f"{name} {n}" for name, n in lengths.items())
        ends = [f"{name}: {why}." for name, found in results.items() if (why := found.get("ended"))]

        def curve(key: str) -> dict[str, list[tuple[float, float]]]:
            return {
                name: [(b["end"], b[key]) for b in found["buckets"] if b[key] is not None]
                for name, found in results.items()
            }

        axis: dict[str, Any] = {"x_label": "position (tokens, up to)", "y_label": "nats per token", "log_x": True}
        title, note = "Loss beyond the training length", " ".join([f"Training length: {told}.", *ends])
        views = [Lines(title, note, series=curve("loss"), **axis)]
        rises = {name: points for name, points in curve("rise").items() if points}
        if rises:
            note = "On the same tokens, against a context of the training length at most: below 0 it helps, else harms."
            title = "What context beyond the training length adds to the loss"
            views.append(Lines(title, note, series=rises, **axis))
        return views


def short_context_losses(model: Any, ids: torch.Tensor, short: int, rows: int) -> torch.Tensor:
    """Losses [B, T - short] of the tokens from position `short` on of ids [B, T], after `short // 2` to `short - 1`
    tokens each.

    Overlapping windows of `short` tokens are read, `rows` at once, and the losses of the second half of each are kept.
    """
    step = short - short // 2
    count = math.ceil((ids.shape[1] - short) / step)
    # Tokens behind the end, of which nothing is kept, fill the last window.
    wide = torch.cat([ids, ids[:, :step]], dim=1)
    windows = wide[:, step:].unfold(1, short, step)[:, :count].flatten(0, 1)  # [B * count, short]
    losses = [position_losses(model, part)[:, short // 2 - 1 :] for part in windows.split(rows)]
    return torch.cat(losses).view(len(ids), -1)[:, : ids.shape[1] - short]


def _bucket(full: torch.Tensor, near: torch.Tensor, first: int, end: int, short: int) -> dict[str, Any]:
    loss = full[:, first - 1 : end - 1].mean(1)
    numbers = {"loss": loss.mean()}
    if first >= short:
        rise = loss - near[:, first - short : end - short].mean(1)  # a number for each window
        numbers |= {"short": (loss - rise).mean(), "rise": rise.mean()}
        numbers |= {"error": rise.std() / math.sqrt(len(rise))} if len(rise) > 1 else {}
    finite = {key: float(value) for key, value in numbers.items() if value.isfinite()}
    return {"first": first, "end": end, **{key: finite.get(key) for key in ("loss", "short", "rise", "error")}}
