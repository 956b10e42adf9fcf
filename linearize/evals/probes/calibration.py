"""How sure the model is of its predictions, against how often they come true, and what the loss owes to that.

Temperature scaling (Guo et al. 2017, arXiv:1706.04599): all logits divided by one number T, and the loss where that is
lowest. A model that is too sure of itself has its lowest loss at a T above 1. A student whose loss is below its
teacher's may predict no better and only be less sure; what is left of the difference when each has the temperature that
suits it best is not of that kind. The temperature is fitted on the windows that are scored. The expected calibration
error (equation 3), of the likeliest token in 15 bins of confidence, is 0 where predictions with a probability of p are
right in a share p of the cases.

Of a teacher, on text that it has not seen: at its best temperature T, given to stage `logit_kl` as
`teacher_temperature`, the student has the lowest loss, and at the root of T it has most of that and stays nearer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, PositiveInt

from linearize.evals.probes.base import DoesNotFit, Probe, ProbeConfig, Rows, Subject
from linearize.evals.views import Lines, Table, View
from linearize.schema import Count

TEMPERATURES = tuple(2 ** (step / 10) for step in range(-10, 16))
"""0.5 to 2.83, each 7% above the one before; 1 is among them."""
BINS = 15
PIECE = 2**20
"""Float32 logits that are looked at together: as many as caches hold, for each is read once a temperature."""


class CalibrationConfig(ProbeConfig):
    """Settings."""

    length: Count | None = Field(None, gt=1, description="Tokens per window. Default: the training length.")
    windows: PositiveInt = Field(16, description="Windows of text, evenly spaced over it.")


class Calibration(Probe):
    """Loss by temperature, the best of them, and the expected calibration error of the model as it is."""

    Config = CalibrationConfig

    def rows(self, seq_len: int) -> Rows:
        """The windows."""
        return [(self.config.windows, self.config.length or seq_len)]

    def run(self, subject: Subject) -> dict[str, Any]:
        """`{"length", "windows", "loss", "temperature", "calibrated", "error", "curve": [{"temperature", "loss"}],
        "notes"}`: nats per token as the model is and at the best temperature, that temperature, and the expected
        calibration error, a share.

        Raises:
            DoesNotFit: when the windows have no token to predict.
        """
        length, notes = subject.fitting(self.config.length or subject.seq_len)
        if length < 2:
            raise DoesNotFit(
                f"calibration predicts tokens from those before, and its windows have {length}; give a longer text or "
                "length, or leave the probe out"
            )
        losses = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
        bins = torch.zeros(3, BINS, dtype=torch.float64)  # predictions, their confidence and the right ones, summed
        windows = 0
        for ids in subject.batches(length, self.config.windows):
            logits = subject.model(input_ids=ids, use_cache=False).logits  # [B, T, V]
            step = max(1, PIECE // (len(ids) * logits.shape[-1]))
            for i in range(0, length - 1, step):
                scores = logits[:, i : min(i + step, length - 1)].float().flatten(0, 1)
                targets = ids[:, i + 1 : i + 1 + step].flatten()
                losses += _losses(scores, targets)
                bins += _bins(scores, targets)
            windows += len(ids)
        losses /= windows * (length - 1)
        temperature, calibrated = _lowest(losses.tolist())
        if temperature in (TEMPERATURES[0], TEMPERATURES[-1]):
            notes.append(f"the loss is lowest at a temperature of {temperature:.3g}, the last that was tried")
        return {
            "length": length,
            "windows": windows,
            "loss": float(losses[TEMPERATURES.index(1.0)]),
            "temperature": temperature,
            "calibrated": calibrated,
            "error": float((bins[1] - bins[2]).abs().sum() / bins[0].sum()),
            "curve": [{"temperature": t, "loss": float(x)} for t, x in zip(TEMPERATURES, losses, strict=True)],
            "notes": notes,
        }

    @classmethod
    def views(cls, results: Mapping[str, dict[str, Any]]) -> Sequence[View]:
        """The numbers, and the loss over the temperature."""
        return [
            *cls.summary(results),
            Lines(
                "Loss by temperature",
                "Logits divided by the temperature. Lowest above 1: too sure of itself.",
                x_label="temperature",
                y_label="nats per token",
                series={
                    name: [(p["temperature"], p["loss"]) for p in found["curve"] if p["loss"] is not None]
                    for name, found in results.items()
                },
            ),
        ]

    @classmethod
    def summary(cls, results: Mapping[str, dict[str, Any]]) -> Sequence[View]:
        """The numbers, and on how much text they were taken."""
        columns = ["", "loss", "best temperature", "loss there", "calibration error"]
        keys = ("loss", "temperature", "calibrated", "error")
        taken = {name: f"{found['windows']:,} x {found['length']:,} tokens" for name, found in results.items()}
        same = len(set(taken.values())) == 1
        told = next(iter(taken.values())) if same else ", ".join(f"{size} ({name})" for name, size in taken.items())
        note = f"On {told} of text."
        if len(results) > 1:
            note += " A lower loss there than the teacher's is more than less confidence."
        elif (best := next(iter(results.values()))["temperature"]) and math.isfinite(best):
            note += (
                f" As a teacher in stage logit_kl: teacher_temperature {math.sqrt(best):.3g}, its root, to {best:.3g}."
            )
        rows = [[name, *(found[key] for key in keys)] for name, found in results.items()]
        return [Table("Calibration", note, columns=columns, rows=rows)]


def _losses(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss at each of `TEMPERATURES`, summed, [n] float64; scores [N, V], targets [N]."""
    below = scores - scores.amax(-1, keepdim=True)
    found, scaled = below.gather(-1, targets[:, None]).squeeze(-1), torch.empty_like(below)
    losses = [torch.mul(below, 1 / t, out=scaled).exp_().sum(-1).log() - found / t for t in TEMPERATURES]
    return torch.stack([loss.double().sum() for loss in losses]).cpu()


def _lowest(losses: list[float]) -> tuple[float, float]:
    """The best temperature and the loss there, by a parabola over the logarithm of the three that are best; NaN where
    losses are not finite.
    """
    if not all(map(math.isfinite, losses)):
        return math.nan, math.nan
    i = min(range(len(losses)), key=losses.__getitem__)
    if not 0 < i < len(losses) - 1:
        return TEMPERATURES[i], losses[i]
    before, here, after = losses[i - 1 : i + 2]
    slope, bend = (after - before) / 2, before - 2 * here + after
    move = -slope / bend if bend > 0 else 0.0  # in steps from the best one
    return TEMPERATURES[i] * 2 ** (move / 10), here + slope * move / 2


def _bins(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Number of predictions, their confidence and the right ones by bin of confidence, summed: [3, BINS] float64."""
    confidence, likeliest = scores.softmax(-1).max(-1)
    place = (confidence.nan_to_num(0) * BINS).long().clamp(max=BINS - 1)  # what is NaN stays so in the sums
    values = torch.stack([torch.ones_like(confidence), confidence, (likeliest == targets).float()]).double()
    return torch.zeros(3, BINS, dtype=torch.float64, device=scores.device).index_add_(1, place, values).cpu()
