"""What the tests of probes share: a text, and a subject whose teacher is the model on its softmax path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch

from linearize.evals.probes.base import Subject, probe_of
from linearize.evals.text import evaluating
from linearize.mixers.base import Mixer
from linearize.registry import find
from linearize.swap import teacher_path

TEXT = torch.randint(3, 97, (2048,), generator=torch.Generator().manual_seed(0))


def run_probe(probe: dict[str, Any] | str, model: Any, tokenizer: Any = None, **changes: Any) -> dict[str, Any]:
    """What the probe finds; the training length is 32 tokens."""

    @contextmanager
    def teacher() -> Iterator[Any]:
        with teacher_path(model):
            yield model

    values = {"text": TEXT, "seq_len": 32, "teacher": teacher, **changes}
    with evaluating(model):
        return probe_of(probe).run(Subject(model=model, tokenizer=tokenizer, **values))


def small(key: str) -> dict[str, Any]:
    """Settings with which a mixer reads through its recurrent branch within 32 tokens."""
    return {"bank": 4} if "bank" in {field.name for field in fields(find("mixers", key, Mixer).Config)} else {}


def windows(length: int, count: int, text: torch.Tensor = TEXT) -> torch.Tensor:
    """[count, length] the windows that probes read, evenly spread over the text."""
    available = len(text) // length
    return torch.stack([text[(i * available // count) * length :][:length] for i in range(count)])
