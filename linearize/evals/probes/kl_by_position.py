"""How far the student's predictions are from its teacher's, by position in the window.

KL(teacher || student) over the whole vocabulary in nats per token, and how often both find the same token likeliest. A
student that only lost what lies far back has a divergence that grows with the position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pydantic import Field, PositiveInt

from linearize.evals.divergence import divergence_by_position
from linearize.evals.probes.base import Probe, ProbeConfig, Rows, Subject
from linearize.evals.text import doubling_edges
from linearize.evals.views import Lines, View
from linearize.schema import Count


class KLByPositionConfig(ProbeConfig):
    """Settings."""

    length: Count | None = Field(None, gt=1, description="Tokens per window. Default: twice the training length.")
    windows: PositiveInt = Field(16, description="Windows of text, evenly spaced over it.")


class KLByPosition(Probe):
    """KL and agreement in buckets of positions whose widths double: 1 to 63, 64 to 127, 128 to 255, ..."""

    Config = KLByPositionConfig
    tells_broken = True
    needs_teacher = True

    def rows(self, seq_len: int) -> Rows:
        """The windows."""
        return [(self.config.windows, self.config.length or 2 * seq_len)]

    def run(self, subject: Subject) -> dict[str, Any]:
        """`{"length", "buckets": [{"first", "end", "kl", "same"}], "notes"}` for positions first <= p < end."""
        assert subject.teacher is not None
        length, notes = subject.fitting(self.config.length or 2 * subject.seq_len)
        scoring = {"windows": self.config.windows, "batch_size": subject.batch_size}
        kl, same = divergence_by_position(subject.model, subject.teacher, subject.text, length=length, **scoring)
        buckets = [
            {"first": a, "end": b, "kl": float(kl[a - 1 : b - 1].mean()), "same": float(same[a - 1 : b - 1].mean())}
            for a, b in pairwise(doubling_edges(length))
        ]
        return {"length": length, "buckets": buckets, "notes": notes}

    @classmethod
    def views(cls, results: Mapping[str, dict[str, Any]]) -> Sequence[View]:
        """Both quantities over the position."""

        def curve(key: str) -> dict[str, list[tuple[float, float]]]:
            return {
                name: [(b["end"], b[key]) for b in found["buckets"] if b[key] is not None]
                for name, found in results.items()
            }

        axis: dict[str, Any] = {"x_label": "position (tokens, up to)", "log_x": True}
        return [
            Lines("KL to the teacher by position", y_label="nats per token", series=curve("kl"), **axis),
            Lines("Same likeliest token by position", y_label="share of positions", series=curve("same"), **axis),
        ]
