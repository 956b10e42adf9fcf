"""How far the student's predictions are from its teacher's, by position in the window.

KL(teacher || student) over the whole vocabulary in nats per token, and how often both find the same token likeliest. A
student that only lost what lies far back has a divergence that grows with the position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field, PositiveInt

from linearize.evals.probes.base import Probe, ProbeConfig, Subject
from linearize.evals.text import LOGIT_BUDGET, doubling_edges, spread_windows
from linearize.evals.views import Lines, View
from linearize.schema import Count


class KLByPositionConfig(ProbeConfig):
    """Settings."""

    length: Count | None = Field(None, gt=1, description="Tokens per window. Default: twice the training length.")
    windows: PositiveInt = Field(16, description="Windows of text, evenly spaced over it.")


class KLByPosition(Probe):
    """KL and agreement in buckets of positions whose widths double: 1 to 63, 64 to 127, 128 to 255, ..."""

    Config = KLByPositionConfig
    needs_teacher = True

    def run(self, subject: Subject) -> dict[str, Any]:
        """`{"length", "buckets": [{"first", "end", "kl", "same"}], "notes"}` for positions first <= p < end."""
        assert subject.teacher is not None
        length, notes = subject.fitting(self.config.length or 2 * subject.seq_len)
        starts = spread_windows(len(subject.text), length, self.config.windows)
        kl, same = torch.zeros(length - 1, dtype=torch.float64), torch.zeros(length - 1, dtype=torch.float64)
        for first in range(0, len(starts), subject.batch_size):
            rows = [subject.text[start : start + length] for start in starts[first : first + subject.batch_size]]
            ids = torch.stack(rows).to(subject.model.device)
            with subject.teacher() as teacher:
                expected = teacher(input_ids=ids, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
            found = subject.model(input_ids=ids, use_cache=False).logits[:, :-1]
            step = max(1, LOGIT_BUDGET // (found.shape[0] * found.shape[-1]))
            for i in range(0, length - 1, step):
                at = slice(i, i + step)
                kl[at] += _kl(expected[:, at], found[:, at])
                same[at] += (expected[:, at].argmax(-1) == found[:, at].argmax(-1)).double().sum(0).cpu()
        buckets = [
            {
                "first": a,
                "end": b,
                "kl": float(kl[a - 1 : b - 1].mean() / len(starts)),
                "same": float(same[a - 1 : b - 1].mean() / len(starts)),
            }
            for a, b in pairwise(doubling_edges(length))
        ]
        return {"length": length, "buckets": buckets, "notes": notes}

    @classmethod
    def views(cls, results: Mapping[str, dict[str, Any]]) -> Sequence[View]:
        """Both quantities over the position."""

        def curve(key: str) -> dict[str, list[tuple[float, float]]]:
            return {name: [(b["end"], b[key]) for b in found["buckets"]] for name, found in results.items()}

        axis: dict[str, Any] = {"x_label": "position (tokens, up to)", "log_x": True}
        return [
            Lines("KL to the teacher by position", y_label="nats per token", series=curve("kl"), **axis),
            Lines("Same likeliest token as the teacher", y_label="share of positions", series=curve("same"), **axis),
        ]


def _kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) summed over rows: [B, T, V] twice -> [T] float64."""
    t, s = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1).double().sum(0).cpu()
