"""Sections of a recipe whose keys depend on their `type`, a mixer's, a stage's or a selector's, validated strictly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError

from linearize.errors import UserError
from linearize.mixers.base import config_from_dict
from linearize.registry import find_class
from linearize.schema import no_truth, user_error


def type_of(value: dict[str, Any], where: str) -> str:
    """What a section names.

    Raises:
        UserError: where it names nothing.
    """
    key = value.get("type")
    if not isinstance(key, str):
        raise UserError(f"{where}.type is missing; it names which {where.split('.')[0].removesuffix('s')} to use")
    return key


def mixer_config(settings: Mapping[str, Any]) -> Any:
    """The config of the mixer that `settings`, the recipe's `mixer` section, describe, validated strictly.

    Raises:
        UserError: for an unknown mixer, part or key, or a value that does not fit.
    """

    def construct(cls: type, values: dict[str, Any], where: str) -> Any:
        try:
            hints = get_type_hints(cls)
            for key, value in values.items():
                try:
                    no_truth(hints[key], value)
                except ValueError as error:
                    raise UserError(f"{where}.{key}: {error}") from error
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            raise user_error(error, where, [field.name for field in dataclasses.fields(cls)]) from None

    values = {k: v for k, v in settings.items() if k != "type"}
    cls: Any = find_class("mixers", settings["type"])
    try:
        return config_from_dict(cls.Config, values, find_class, where="mixer", construct=construct)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def resolved(config: type[BaseModel], settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a stage or selector, validated, with the defaults of all that are not given."""
    try:
        return config.model_validate(settings).model_dump(mode="json")
    except ValidationError as error:
        raise user_error(error, where, config.model_fields) from None
