"""Files of a report as checked data. What is damaged or foreign is a `UserError` that names the file and the reason.

`load(path)` reads JSON, `checked(values, kind, where)` makes it a dataclass, or a list of them, all of whose fields
then have their types.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from linearize.errors import UserError


@dataclass(frozen=True)
class Facts:
    """What a report takes from `run/plan.json`; see `linearize.report.conversions.facts_of`."""

    source: str
    family: str
    mixer: str
    layers: str
    new_parameters: int
    source_parameters: int
    state_bytes: list[int]
    kv_bytes_per_token: list[int]
    dtype: str
    reach: list[int | None] | None = None
    causal: bool = True
    architecture: str | None = None


def load(path: Path) -> Any:
    """The values of a JSON file."""
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); it was cut off, or is something else") from error


def read_text(path: Path) -> str:
    """The text of a file, UTF-8."""
    try:
        return _text(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text ({error})") from error


def load_lines(path: Path) -> tuple[list[Any], int]:
    """The values of a file of JSON lines, and how many of its lines are none.

    The last line does not count among these: a run that is still going on may have written half of it.
    """
    found, broken = [], 0
    lines = read_text(path).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            broken += number < len(lines)
    return found, broken


def checked(values: Any, kind: Any, where: object) -> Any:
    """`values` as a `kind`; keys that it does not have are ignored, for a newer version may have written them."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        told = f"{place}: {first['msg'].lower()}" if place else first["msg"].lower()
        raise UserError(f"{where} is damaged, or of another version of linearize ({told})") from error


def check_facts(values: Any, where: object) -> dict[str, Any]:
    """`values` unchanged, which a plan's facts must be."""
    facts = checked(values, Facts, where)
    sizes = [facts.layers, facts.state_bytes, facts.kv_bytes_per_token, facts.reach or facts.layers]
    if len({len(sized) for sized in sizes}) > 1:
        raise UserError(f"{where} is damaged: it tells of different numbers of layers")
    return values


def what(values: Any) -> str:
    """What some JSON holds, in a few words."""
    if isinstance(values, dict):
        keys = [repr(key) for key in values]
        return f"an object with {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}" if keys else "an empty object"
    if isinstance(values, list):
        return f"a list of {len(values)}" if values else "an empty list"
    return repr(values) if len(repr(values)) <= 40 else f"a {type(values).__name__}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
