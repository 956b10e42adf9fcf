"""The probe contract: one measurement of a model, from text and its teacher, to plain data, to views.

A recipe asks with `evaluation: {probes: [state_norms, {type: kl_by_position, length: 1024}]}`, a command with
`linearize evaluate DIR --probes state_norms,kl_by_position`. A probe runs on a model in memory, and its result is plain
data that goes to JSON; what it looks like is made from that data alone, for several models side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, ValidationError

from linearize.errors import UserError, did_you_mean
from linearize.evals.probe_groups import GROUPS
from linearize.evals.text import windows_of
from linearize.evals.views import Bars, Number, View
from linearize.positions import learned
from linearize.registry import find, keys
from linearize.schema import Strict, user_error

Rows = Sequence[tuple[int, int]]
"""(number, tokens of each) of windows of text, or of questions with their answers; 0 tokens where that is open."""


class ProbeConfig(Strict):
    """Settings of every probe."""

    type: str = Field(description="Which probe: the name of a file in linearize/evals/probes, or module:Class.")


class DoesNotFit(UserError):
    """A model or text that a probe's settings do not fit: it is left out, a note says why, and all else is measured."""


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

    def batches(self, length: int, windows: int, rows: int | None = None) -> Iterator[torch.Tensor]:
        """Windows of text [B, length], evenly spread over it, on the model's device; `rows` at once, else
        `batch_size`.

        Raises:
            UserError: when the text is shorter than one window.
        """
        return windows_of(self.text, length, windows, rows or self.batch_size, self.model.device)

    def fitting(self, length: int) -> tuple[int, list[str]]:
        """The length in tokens, at most that of the text and, where positions end, of the model; and notes on what a
        reader must know of it.
        """
        notes = []
        if length > len(self.text):
            notes.append(f"{length} tokens were asked for, the text has {len(self.text)}; give a longer one for more")
            length = len(self.text)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is None or length <= limit:
            return length, notes
        if learned(self.model) is not None:
            return limit, [*notes, f"lengths end at {limit} tokens, for the model has no further positions"]
        return length, [*notes, f"positions from {limit} on are beyond those that the source model was trained for"]


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
    tells_broken: ClassVar[bool] = False
    """Whether the result itself has None, or a number that is not finite, where predictions are NaN or infinite. The
    results of other probes are dropped if any prediction was."""

    unit: ClassVar[str] = "windows"
    """What `rows` counts."""

    def __init__(self, config: Any):
        self.config = config

    def rows(self, seq_len: int) -> Rows:
        """What will be read where nothing is too short for it, to be told before; empty where that is not known.

        Args:
            seq_len: the training length.
        """
        return []

    def check(self) -> None:
        """Raise a UserError for settings that can be known to be wrong before a model is there, such as files."""

    def check_text(self, tokens: int, told: str) -> None:
        """Raise a UserError where a setting `length` asks for longer windows than a text of `tokens` tokens, known
        before a model is there; `told` says whose and how many. Lengths that follow from the training length end with
        the text instead, and a note says so.
        """
        length = getattr(self.config, "length", None)
        if self.unit == "windows" and isinstance(length, int) and length > tokens:
            raise UserError(
                f"probe {self.config.type}: {told}, fewer than one window of length={length:,}; choose a shorter "
                "length or a longer text"
            )

    def run(self, subject: Subject) -> dict[str, Any]:
        """Measure. The model is as it was afterwards.

        Returns:
            Plain data for JSON; numbers that are not finite become None, with a note.

        Raises:
            DoesNotFit: when the model or text does not fit the settings; the text names the probe and the remedy.
        """
        raise NotImplementedError

    @classmethod
    def views(cls, results: Mapping[str, dict[str, Any]]) -> Sequence[View]:
        """What to show of the results, after a trip through JSON, of one or more models.

        Args:
            results: name of the model -> what `run` returned.
        """
        raise NotImplementedError

    @classmethod
    def summary(cls, results: Mapping[str, dict[str, Any]]) -> Sequence[View]:
        """What a terminal shows of the same results: the views, where they are not too many."""
        return cls.views(results)


def layer_bars(
    title: str,
    y_label: str,
    results: Mapping[str, dict[str, Any]],
    value: Callable[[dict[str, Any]], Number],
    note: str,
) -> Bars:
    """A group of bars for each layer that any of the models was measured in.

    Args:
        results: name of the model -> data whose `layers` is a list of `{"layer": its number, ...}`.
        value: the height of the bar of an entry of that list.
    """
    found = {name: {at["layer"]: value(at) for at in result["layers"]} for name, result in results.items()}
    layers = sorted({layer for heights in found.values() for layer in heights})
    return Bars(
        title,
        note,
        y_label=y_label,
        labels=[f"layer {layer}" for layer in layers],
        series={name: [heights.get(layer) for layer in layers] for name, heights in found.items()},
    )


def probe_of(settings: str | Mapping[str, Any], where: str = "probes") -> Probe:
    """The probe that a key, or `type` and settings, name.

    Raises:
        UserError: for an unknown probe or a setting that does not fit.
    """
    values: Any = {"type": settings} if isinstance(settings, str) else settings
    if not isinstance(values, Mapping) or not isinstance(values.get("type"), str):
        raise UserError(f"{where} must be names of probes, or {{type: name, ...}}, got {settings!r}")
    key = values["type"]
    if ":" not in key and key not in (known := keys("evals.probes")):
        hint = did_you_mean(key, [*known, *GROUPS])
        groups = " and ".join(sorted(GROUPS))
        raise UserError(f"unknown probe {key!r}{hint}; {groups} are groups of them; `module:Class` names your own")
    found = find("evals.probes", key, Probe)
    try:
        return found(found.Config.model_validate(values))
    except ValidationError as error:
        raise user_error(error, where, found.Config.model_fields) from None
