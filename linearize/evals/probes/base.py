"""The probe contract: one measurement of a model, from text and its teacher, to plain data, to views.

A recipe asks with `evaluation: {probes: [state_norms, {type: kl_by_position, length: 1024}]}`, a command with
`linearize evaluate DIR --probes state_norms,kl_by_position`. A probe runs on a model in memory, and its result is plain
data that goes to JSON; what it looks like is made from that data alone, for several models side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, ValidationError

from linearize.errors import UserError
from linearize.evals.views import View
from linearize.registry import find
from linearize.schema import Strict, user_error


class ProbeConfig(Strict):
    """Settings of every probe."""

    type: str = Field(description="Which probe: the name of a file in linearize/evals/probes, or module:Class.")


@dataclass(frozen=True)
class Subject:
    """What a probe looks at."""

    model: Any
    """A causal LM in evaluation mode, without gradients."""
    tokenizer: Any
    text: torch.Tensor
    """[N] held-out tokens."""
    seq_len: int
    """The training length in tokens, or where it is not known the first length that losses are taken at."""
    batch_size: int = 4
    """Rows per forward; results do not depend on it."""
    teacher: Callable[[], AbstractContextManager[Any]] | None = None
    """`with subject.teacher() as model:` is the source model, which may be `model` itself in another state; None where
    there is none, or where `model` is the source."""


class Probe:
    """Base class of all probes. A subclass lives in a file named after its key, which opens with what it measures.

    Args:
        config: an instance of the subclass's `Config`.
    """

    Config: ClassVar[type[ProbeConfig]] = ProbeConfig
    needs_teacher: ClassVar[bool] = False
    """Whether it compares with the source model; it is left out where there is none."""
    needs_mixers: ClassVar[bool] = False
    """Whether it looks into mixers; it is left out for models without."""

    def __init__(self, config: Any):
        self.config = config

    def run(self, subject: Subject) -> dict[str, Any]:
        """Measure. The model is as it was afterwards.

        Returns:
            Plain data for JSON, with finite numbers.

        Raises:
            UserError: when the model or text does not fit the settings; the remedy names `probes`.
        """
        raise NotImplementedError

    @classmethod
    def views(cls, results: Mapping[str, dict[str, Any]]) -> Sequence[View]:
        """What to show of the results, after a trip through JSON, of one or more models.

        Args:
            results: name of the model -> what `run` returned.
        """
        raise NotImplementedError


def probe_of(settings: str | Mapping[str, Any], where: str = "probes") -> Probe:
    """The probe that a key, or `type` and settings, name.

    Raises:
        UserError: for an unknown probe or a setting that does not fit.
    """
    values = {"type": settings} if isinstance(settings, str) else dict(settings)
    if not isinstance(values.get("type"), str):
        raise UserError(f"{where} must be names of probes, or {{type: name, ...}}, got {settings!r}")
    found = find("evals.probes", values["type"], Probe)
    try:
        return found(found.Config.model_validate(values))
    except ValidationError as error:
        raise user_error(error, where, found.Config.model_fields) from None
