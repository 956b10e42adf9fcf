"""The report of an evaluation: what was measured on a checkpoint, kept as JSON and shown as a table.

`linearize.evals.evaluate.evaluate` makes it; `linearize.report` makes pages of several.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.errors import check_target, write_whole
from linearize.evals.finite import nulled
from linearize.evals.measurement import Measurement
from linearize.evals.probe_views import as_text, probe_views
from linearize.evals.table import side_by_side


@dataclass(frozen=True)
class Report:
    """What was measured on a checkpoint, with what is needed to measure it again."""

    model: str
    student: Measurement
    teacher_model: str | None
    teacher: Measurement | None
    settings: dict[str, Any]
    """The resolved `EvalConfig`, as plain data, and the text it was taken on."""
    environment: dict[str, str]
    """Versions, device and data type."""

    def table(self, *, trust_remote_code: bool = False) -> str:
        """Metrics as rows; teacher, student and difference as columns; then short tables of the probes, with
        `trust_remote_code` also of those that the report names as `module:Class`, which imports them.
        """
        names = [f"student: {self.model}" if self.teacher else f"model: {self.model}"]
        names += [f"teacher: {self.teacher_model}"] if self.teacher else []
        measured = {"student" if self.teacher else "model": self.student}
        measured |= {"teacher": self.teacher} if self.teacher else {}
        views, missing = probe_views(measured, trusted=trust_remote_code, brief=True)
        parts = ["\n".join(names), side_by_side(self.student, self.teacher), *map(as_text, views), *missing]
        return "\n\n".join(parts)

    def to_json(self, path: str | Path) -> None:
        """Write the report; folders are created."""
        check_target(path)
        data = nulled(dataclasses.asdict(self))
        write_whole(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> Report:
        """Read what `to_json` wrote."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        teacher = values["teacher"]
        return cls(
            **{
                **values,
                "student": Measurement.from_dict(values["student"]),
                "teacher": None if teacher is None else Measurement.from_dict(teacher),
            }
        )
