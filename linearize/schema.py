"""Shared pieces of the strict recipe schema: the base model, counts such as `20M`, and readable validation errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from linearize.errors import UserError, did_you_mean

WITHOUT_EFFECT: Any = {"without_effect": True}
"""`json_schema_extra` of a field that changes speed, memory or what is written, and no result that training leaves: a
resumed conversion may change it."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


class Strict(BaseModel):
    """Base of every recipe section: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_a_truth(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        return no_truth(cls.model_fields[info.field_name].annotation, value)


def no_truth(annotation: Any, value: Any) -> Any:
    """`value`, unless it has a true or false where `annotation` wants a number: Python takes these for 1 and 0.

    Raises:
        ValueError: naming the value.
    """
    kinds = _members(annotation)
    if isinstance(value, bool):
        if bool not in kinds and Any not in kinds and (int in kinds or float in kinds):
            raise ValueError(f"must be a number, got {str(value).lower()}")
        return value
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    holders = (dict,) if isinstance(value, dict) else (list, tuple)
    items = [get_args(kind)[-1] for kind in kinds if get_origin(kind) in holders]
    for item in inside if items else ():
        no_truth(Union[tuple(items)], item)  # noqa: UP007  # of types known at run time
    return value


def _members(annotation: Any) -> list[Any]:
    """The types of a union, nested ones and `Annotated` resolved; of any other type itself."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [kind for member in get_args(annotation) for kind in _members(member)]
    return [annotation]


def without_effect(field: FieldInfo) -> bool:
    """Whether the field is marked by `WITHOUT_EFFECT`."""
    return isinstance(field.json_schema_extra, dict) and "without_effect" in field.json_schema_extra


MOST = 10**18
"""No count is larger."""


def parse_count(value: Any) -> Any:
    """Read `20M`, `1.5k`, `300` or `20_000` as an integer; anything else is left for pydantic to judge."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kKmMbB]?)\s*", re.sub(r"(?<=\d)_(?=\d)", "", value))
        if not match:
            raise ValueError(f"{value!r} is not a count; write a number such as 20M, 500k or 1024")
        number = float(match[1]) * _UNITS[match[2].lower()]
        value = round(number) if number <= MOST else MOST + 1
    if isinstance(value, int) and value > MOST:
        raise ValueError(f"a count can be {MOST:.0e} at most")
    return value


Count = Annotated[int, BeforeValidator(parse_count)]
"""A non-negative integer that may be written with a unit: 20M, 500k, 1.5B."""
Seed = Annotated[int, Field(ge=0, lt=2**64)]
"""What numpy and torch both take as a seed."""


def user_error(error: ValidationError, where: str, known: Iterable[str] = ()) -> UserError:
    """Say what is wrong with a section, one line per problem, with the key's path under `where`.

    `known` are the section's keys; of a model's `model_fields` those of the sections inside are known too.
    """
    known = known if isinstance(known, Mapping) else list(known)
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in (where, *problem["loc"]) if part != "")
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, UserError) and path in str(cause):  # from a section inside, and says which
            lines.append(str(cause))
        elif problem["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
            lines.append(f"unknown key {path!r}{did_you_mean(str(problem['loc'][-1]), _inside(known, problem['loc']))}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            told = problem["type"] == "missing" or re.search(r"\bgot\b", message)
            given = "" if told else f" (got {problem['input']!r})"
            lines.append(f"{path}: {message}{given}")
    return UserError("; ".join(lines))


def _inside(known: Iterable[str], place: Sequence[int | str]) -> Iterable[str]:
    """The keys that the section has in which the last key of `place` stands."""
    for key in place[:-1]:
        field = known.get(key) if isinstance(known, Mapping) else None
        kinds = _members(field.annotation) if isinstance(field, FieldInfo) else []
        known = next((k.model_fields for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), known)
    return known


def differences(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """Where two structures of plain data differ: path such as `stages.0.lr` -> both values, None for one not there."""
    a, b = _flat(one), _flat(other)
    return {k: (a.get(k), b.get(k)) for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)}


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)  # type: ignore[assignment]
    else:
        return {path: value}
    return {k: v for key, child in items for k, v in _flat(child, f"{path}.{key}" if path else str(key)).items()}
