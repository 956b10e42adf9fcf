"""Synthetic tasks as probes: puzzles written from a seed, hidden in held-out text, asked at exact lengths.

A task is a file in `linearize/evals/probes` with a class that derives from `SyntheticProbe`, or from `DepthProbe`
where the asked thing has a place, and a method `write`, which gives a `Puzzle`: text alone, whatever the tokenizer.
Fitting it to a length, asking, and views come with the base class.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveInt

from linearize.evals.probes.base import Probe, ProbeConfig, Rows, Subject
from linearize.evals.synthetic.items import Fitter, Item, Puzzle, largest
from linearize.evals.synthetic.score import Score, score
from linearize.evals.table import percent
from linearize.evals.views import HeatMap, Number, Table, View
from linearize.schema import Count, Seed

KEYS = [field.name for field in dataclasses.fields(Score)]
SHARES = ("generated", "low", "high", "likelihood", "chance")
"""Those of them that are shown in percent."""

MAPS = 4
"""Models up to which each has a heat map of its own."""
LEGEND = (
    "generated: score of the greedy continuations, low and high: its 95% interval; likelihood: how often the right "
    "answer is likelier than each wrong one, chance: by guessing; nats: per token of the right answer."
)


class SyntheticConfig(ProbeConfig):
    """Settings of every synthetic task."""

    lengths: list[Annotated[Count, Field(gt=0)]] = Field(
        default_factory=list,
        description="Tokens of prompt and longest answer together. Default: half, once and twice the training length.",
    )
    items: PositiveInt = Field(16, description="Questions for each length and depth.")
    seed: Seed = Field(0, description="Seed of the questions; all models are asked the same.")
    just_read_twice: bool = Field(
        False, description="Give the context twice before the question, as in Just Read Twice (arXiv:2407.05483)."
    )


class DepthConfig(SyntheticConfig):
    """Settings of tasks whose asked thing has a place in the context."""

    depths: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.0, 0.25, 0.5, 0.75, 1.0],
        min_length=1,
        description="Where the asked thing stands: 0 is the start of the context, 1 its end.",
    )


class SyntheticProbe(Probe):
    """Base of the tasks."""

    Config: ClassVar[type[ProbeConfig]] = SyntheticConfig
    title: ClassVar[str]
    """Heading of the views."""
    axis: ClassVar[str] = "case"
    """What the cases are: the rows of the heat map, and a key of the result's cells."""
    tells_broken = True
    unit = "questions"
    smallest: ClassVar[int | None] = None
    """The smallest `size` of a task whose own material grows with the length; None where the filler alone grows."""

    def write(self, rng: random.Random, case: Any, size: int) -> Puzzle:
        """A puzzle, made of `rng` alone.

        Args:
            case: one of `cases()`.
            size: how much material, for tasks with a `smallest`: the most that fits the length.
        """
        raise NotImplementedError

    def cases(self) -> Sequence[Any]:
        """What is asked at every length: depths, or what else a task varies."""
        return ["all"]

    def depth(self, case: Any) -> float | None:
        """Where the asked piece of a case stands in the filler, 0 to 1; None for anywhere.

        What is left over by material that grows with the length stands before it.
        """
        return None if self.smallest is None else 1.0

    def run(self, subject: Subject) -> dict[str, Any]:
        """`{"axis", "cells": [{"length", <axis>, "n", "generated", ...}], "notes"}`; a cell has the fields of `Score`.

        Lengths beyond the model's positions or the held-out text, or too short for a question, have a note, no cells.
        """
        found: dict[str, Any] = {"axis": self.axis, "cells": [], "notes": []}
        fitter = Fitter(subject.tokenizer, subject.text.tolist(), self.config.just_read_twice)
        for length in self._lengths(subject.seq_len):
            if reason := self._refusal(length, subject, fitter):
                found["notes"].append(f"length {length} was not asked: {reason}")
                continue
            for case in self.cases():
                result = score(subject, self.items(fitter, length, case))
                found["cells"].append({"length": length, self.axis: case, **dataclasses.asdict(result)})
        return found

    def rows(self, seq_len: int) -> Rows:
        """The questions of each length."""
        return [(self.config.items * len(self.cases()), length) for length in self._lengths(seq_len)]

    def _lengths(self, seq_len: int) -> list[int]:
        """In tokens, each once."""
        return list(dict.fromkeys(self.config.lengths or [seq_len // 2, seq_len, 2 * seq_len]))

    def items(self, fitter: Fitter, length: int, case: Any) -> list[Item]:
        """The questions of one cell; each depends on the seed, the cell and its own number alone."""
        return [self._item(fitter, length, case, i) for i in range(self.config.items)]

    def _item(self, fitter: Fitter, length: int, case: Any, i: int) -> Item:
        size = 0
        if self.smallest is not None:
            size = largest(lambda n: fitter.needed(self._puzzle(length, case, i, n)) <= length, self.smallest)
        puzzle = self._puzzle(length, case, i, size)
        return fitter.item(puzzle, length, self._rng("filler", length, case, i), self.depth(case))

    def _puzzle(self, length: int, case: Any, i: int, size: int) -> Puzzle:
        return self.write(self._rng("puzzle", length, case, i), case, size)

    def _rng(self, *key: Any) -> random.Random:
        return random.Random(":".join(map(str, (self.config.type, self.config.seed, *key))))

    def _refusal(self, length: int, subject: Subject, fitter: Fitter) -> str | None:
        """Why a length cannot be asked, None if it can."""
        limit = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length > limit:
            return f"the model has {limit} positions"
        if length > len(fitter.filler):
            return f"the held-out text that fills it has {len(fitter.filler)} tokens"
        every = ((case, i) for case in self.cases() for i in range(self.config.items))
        needed = max(fitter.needed(self._puzzle(length, case, i, self.smallest or 0)) for case, i in every)
        return f"a question takes up to {needed} tokens" if needed > length else None

    @classmethod
    def views(cls, results: Mapping[str, dict[str, Any]]) -> Sequence[View]:
        """A heat map of the generated score for each model, and a table of everything."""
        rows = [
            [
                name,
                cell["length"],
                str(cell[cls.axis]),
                *(percent(cell[key]) if key in SHARES else cell[key] for key in KEYS),
            ]
            for name, found in results.items()
            for cell in found["cells"]
        ]
        notes = "; ".join(dict.fromkeys(note for found in results.values() for note in found["notes"]))
        asked = {name: found["cells"] for name, found in results.items() if found["cells"]}
        one = [cls._overview(asked)] if len(asked) > MAPS else []
        maps = one or [cls._heat_map(name, cells) for name, cells in asked.items()]
        told = f"{LEGEND} {notes}".strip()
        return [*maps, Table(cls.title, told, columns=["model", "length", cls.axis, *KEYS], rows=rows)]

    @classmethod
    def _overview(cls, asked: Mapping[str, Sequence[Mapping[str, Any]]]) -> HeatMap:
        """A row for each model, a column for each cell that any of them was asked."""
        keys = list(dict.fromkeys((cell[cls.axis], cell["length"]) for cells in asked.values() for cell in cells))
        keys.sort(key=lambda key: key[1])
        scores = {
            name: {(cell[cls.axis], cell["length"]): _written(cell) for cell in cells} for name, cells in asked.items()
        }
        return HeatMap(
            cls.title,
            "Mean score of greedy continuations, in percent.",
            x_label=f"length (tokens) / {cls.axis}",
            y_label="",
            x=[f"{length:,}/{case}" for case, length in keys],
            y=list(asked),
            values=[[found.get(key) for key in keys] for found in scores.values()],
            high=100.0,
        )

    @classmethod
    def summary(cls, results: Mapping[str, dict[str, Any]]) -> Sequence[View]:
        """One table: cases as rows, models and lengths as columns."""
        cells = {(name, cell["length"], cell[cls.axis]): cell for name, r in results.items() for cell in r["cells"]}
        tops = dict.fromkeys(key[:2] for key in cells)
        cases = dict.fromkeys(key[2] for key in cells)
        rows = [[str(case), *(_both(cells.get((*top, case))) for top in tops)] for case in cases]
        chances, counts = ({cell[key] for cell in cells.values()} for key in ("chance", "n"))
        note = f"Written / found likeliest of {' or '.join(map(str, sorted(counts)))} questions; guessing finds "
        note += " to ".join(percent(chance) for chance in sorted({*(f(chances, default=0.0) for f in (min, max))}))
        names = [f"{name} {length:,}" if len(results) > 1 else f"{length:,}" for name, length in tops]
        return [Table(cls.title, f"{note}." if cells else "", columns=[f"{cls.axis} \\ tokens", *names], rows=rows)]

    @classmethod
    def _heat_map(cls, name: str, cells: Sequence[Mapping[str, Any]]) -> HeatMap:
        lengths = sorted({cell["length"] for cell in cells})
        cases = list(dict.fromkeys(cell[cls.axis] for cell in cells))
        scores: dict[Any, Number] = {(cell[cls.axis], cell["length"]): _written(cell) for cell in cells}
        return HeatMap(
            f"{cls.title}: {name}",
            "Mean score of greedy continuations, in percent.",
            x_label="length (tokens)",
            y_label=cls.axis,
            x=[f"{length:,}" for length in lengths],
            y=[f"{case}" for case in cases],
            values=[[scores.get((case, length)) for length in lengths] for case in cases],
            high=100.0,
        )


def _written(cell: Mapping[str, Any]) -> float | None:
    """The score of greedy continuations in percent."""
    return None if cell["generated"] is None else 100 * cell["generated"]


def _both(cell: Mapping[str, Any] | None) -> str | None:
    """Both scores of a cell."""
    if cell is None or cell["generated"] is None:
        return None
    return f"{percent(cell['generated'])} / {percent(cell['likelihood'])}"


class DepthProbe(SyntheticProbe):
    """Base of the tasks whose asked thing has a place in the context."""

    Config: ClassVar[type[ProbeConfig]] = DepthConfig
    axis = "depth"

    def cases(self) -> Sequence[float]:
        """The depths."""
        return self.config.depths

    def depth(self, case: float) -> float:
        """The depth itself."""
        return case
