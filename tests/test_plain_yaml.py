"""Scalars of recipes and overrides are those of YAML 1.2, and what is written both versions read alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from linearize import plain_yaml
from linearize.cli._arguments import probes
from linearize.errors import UserError
from linearize.hf.folder import read_mapping
from linearize.recipe import Recipe
from linearize.recipe_files import available

SCALARS: list[tuple[str, Any]] = [
    ("1:30", "1:30"),
    ("1:30.5", "1:30.5"),
    ("yes", "yes"),
    ("No", "No"),
    ("on", "on"),
    ("off", "off"),
    ("true", True),
    ("FALSE", False),
    ("1e-4", 1e-4),
    ("-2E3", -2000.0),
    ("5.", 5.0),
    (".5", 0.5),
    ("-.inf", -math.inf),
    ("010", 10),
    ("+08", 8),
    ("0o17", 15),
    ("0x1F", 31),
    ("0b11", "0b11"),
    ("1_000", "1_000"),
    ("2024-01-01", "2024-01-01"),
    ("~", None),
    ("", None),
    ("=", "="),
    ("1.2.3", "1.2.3"),
    ('"1e-4"', "1e-4"),
    ("!!str 1e-4", "1e-4"),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_are_those_of_the_core_schema(text: str, value: Any) -> None:
    for found in (plain_yaml.read(text), plain_yaml.read(f"[{text or '~'}]")[0], plain_yaml.read(f"a: {text}")["a"]):
        assert type(found) is type(value) and found == value


def test_what_is_written_both_versions_read_alike() -> None:
    texts = [text for text, _ in SCALARS]
    data = {"texts": texts, "values": [1e-5, 1e20, 7, True, None, 0.5], **dict.fromkeys(texts, 1)}
    written = plain_yaml.write(data)
    assert plain_yaml.read(written) == yaml.safe_load(written) == data
    assert yaml.safe_load(yaml.safe_dump("1e-4")) != plain_yaml.read(yaml.safe_dump("1e-4")), "the dumper makes it so"


ODD = ["!!bool maybe", "!!timestamp x", "[" * 5000]


@pytest.mark.parametrize(
    "text", ["a: 1\nb: 2\na: 3", "{a: 1, a: 2}", "!!int x", "!!python/name:os.system", "[", "<<", *ODD]
)
def test_what_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        plain_yaml.read(text)


def test_anchors_and_merged_keys_stay() -> None:
    assert plain_yaml.read("a: &x {lr: 1e-3}\nb: {<<: *x, r: 2}")["b"] == {"lr": 1e-3, "r": 2}


def test_files_overrides_and_probes_read_values_alike(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: demo/lolcats\ndata: {name: 1:30, revision: no}\nstages: []\nlayers: [010]\nseed: 1e1\n")
    file = Recipe.load(path)
    changes = ["data.name=1:30", "data.revision=no", "stages=[]", "layers=[010]", "seed=1e1"]
    assert file == Recipe.load("demo/lolcats", overrides=changes)
    assert (file.data.name, file.data.revision, file.layers, file.seed) == ("1:30", "no", [10], 10)
    (tmp_path / "recipe.yaml").write_text(file.to_yaml())
    assert Recipe.parse(read_mapping(tmp_path / "recipe.yaml")) == file == Recipe.load(tmp_path / "recipe.yaml")
    assert probes("mqar(pairs=010, what=no)") == [{"type": "mqar", "pairs": 10, "what": "no"}]
    recipe = Recipe.load("demo/lolcats", overrides=["stages.0.tokens=1e6", "stages.1.tokens=20_000"])
    assert [stage["tokens"] for stage in recipe.stages] == [1_000_000, 20_000]
    for override, message in (
        ("seed=yes", "valid integer"),
        ("kept={rope: true, rope: false}", "'rope' is there twice"),
    ):
        with pytest.raises(UserError, match=message):
            Recipe.load("demo/lolcats", overrides=[override])


@pytest.mark.parametrize("name", available())
def test_shipped_recipes_say_the_same_in_both_versions(name: str) -> None:
    text = available()[name].read_text()
    assert plain_yaml.read(text) == yaml.safe_load(text)
