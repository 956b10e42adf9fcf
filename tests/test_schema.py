"""Counts with units, strict sections, and one readable line per problem."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field, ValidationError

from linearize.evals.config import EvalConfig
from linearize.schema import Count, Strict, parse_count, user_error


class Section(Strict):
    tokens: Count = Field(10, gt=0)
    name: str


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("20M", 20_000_000),
        ("1.5k", 1500),
        (".5b", 500_000_000),
        ("300", 300),
        (" 2 K ", 2000),
        (7, 7),
        ("0.3M", 300_000),
    ],
)
def test_counts(text: Any, number: int) -> None:
    assert Section(tokens=text, name="x").tokens == number


@pytest.mark.parametrize("text", ["20 MB", "many", "", "-3", "1e6", "2M5"])
def test_what_is_no_count_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="is not a count; write a number such as 20M"):
        parse_count(text)


@pytest.mark.parametrize("value", [0, "0", 1.5, None, [1]])
def test_other_values_are_left_to_the_schema(value: Any) -> None:
    with pytest.raises(ValidationError):
        Section(tokens=value, name="x")


def test_sections_are_strict_and_frozen() -> None:
    section = Section(name="x")
    with pytest.raises(ValidationError, match="frozen"):
        section.tokens = 5  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Section(name="x", tokns=3)  # type: ignore[call-arg]


def test_user_error_has_a_line_for_each_problem() -> None:
    with pytest.raises(ValidationError) as caught:
        Section.model_validate({"tokns": 3, "tokens": "lots"})
    message = str(user_error(caught.value, "data", Section.model_fields))
    assert message.split("; ", 1)[0] == "data.tokens: 'lots' is not a count"
    assert "data.name: Field required" in message
    assert "unknown key 'data.tokns'; did you mean 'tokens'? known: name, tokens" in message
    assert "Value error" not in message


def test_a_value_is_told_once() -> None:
    with pytest.raises(ValidationError) as caught:
        EvalConfig(probes=[{"type": "mqar", "pairs": 0}])
    assert str(user_error(caught.value, "evaluation")).count("got") == 1


def test_a_place_is_told_once() -> None:
    with pytest.raises(ValidationError) as caught:
        EvalConfig(probes=[{"type": "calibration", "windos": 3}])
    message = str(user_error(caught.value, ""))
    assert message == "unknown key 'probes.0.windos'; did you mean 'windows'? known: length, type, windows"


@pytest.mark.parametrize("value", [10**18 + 1, "9" * 400, "2000000000B", 10**400])
def test_counts_that_nothing_can_reach_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="a count can be 1e[+]18 at most"):
        parse_count(value)
