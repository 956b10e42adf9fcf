"""Plug-ins are found by file name alone, or as module:Class from outside, and every mistake is named."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import linearize.mixers
import linearize.stages
from linearize.errors import UserError
from linearize.mixers.base import Mixer
from linearize.mixers.hedgehog import Hedgehog
from linearize.recipe import Recipe
from linearize.registry import find, keys
from linearize.stages.base import Stage

MIXER = """
from linearize.mixers.hedgehog import Hedgehog

class Mine(Hedgehog):
    pass

NOT_A_CLASS = 1
"""
STAGE = """
from linearize.stages.finetune import Finetune

class Again(Finetune):
    pass
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path with the module `outside_mixer`."""
    (tmp_path / "outside_mixer.py").write_text(MIXER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "outside_mixer", raising=False)  # another test has one of that name
    return tmp_path


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A new file in each of the packages of mixers and stages."""
    for package, name, text in ((linearize.mixers, "brand_new", MIXER), (linearize.stages, "once_more", STAGE)):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / f"{name}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    yield


def test_keys_are_the_files_of_the_package() -> None:
    for package in (linearize.mixers, linearize.stages):
        files = {path.stem for path in Path(package.__path__[0]).glob("*.py")}
        assert keys(package.__name__.split(".")[1]) == sorted(files - {"__init__", "base"})
    assert "hedgehog" in keys("mixers") and "parts" not in keys("mixers")


@pytest.mark.parametrize(("package", "base"), [("mixers", Mixer), ("stages", Stage)])
def test_every_key_names_one_class_with_a_config(package: str, base: type) -> None:
    for key in keys(package):
        found = find(package, key, base)
        assert issubclass(found, base) and found.Config
    assert find("mixers", "hedgehog", Mixer) is Hedgehog


def test_a_new_file_is_found_without_being_listed(inside: None) -> None:
    assert "brand_new" in keys("mixers") and "once_more" in keys("stages")
    assert find("mixers", "brand_new", Mixer).__name__ == "Mine"
    data = {
        "model": {"name": "demo"},
        "mixer": {"type": "brand_new", "chunk_size": 32},
        "data": {},
        "stages": [{"type": "finetune", "tokens": 10, "train": ["*"]}],
    }
    recipe = Recipe.parse(data)
    assert recipe.mixer["type"] == "brand_new" and recipe.mixer["chunk_size"] == 32
    assert find("stages", "once_more", Stage).__name__ == "Again"


def test_module_and_class_reach_code_outside_the_package(outside: Path) -> None:
    mine = find("mixers", "outside_mixer:Mine", Mixer)
    assert issubclass(mine, Hedgehog) and mine.__module__ == "outside_mixer"


@pytest.mark.parametrize(
    ("package", "base", "key", "message"),
    [
        ("mixers", Mixer, "hedgehogg", "unknown mixer 'hedgehogg'; did you mean 'hedgehog'\\? known: .*`module:Class`"),
        ("stages", Stage, "finetun", "unknown stage 'finetun'; did you mean 'finetune'\\?"),
        ("mixers", Mixer, "base", "unknown mixer 'base'"),
        ("mixers", Mixer, "no_such_module:Mine", "cannot import 'no_such_module' for mixer .*PYTHONPATH"),
        (
            "mixers",
            Mixer,
            "outside_mixer:Yours",
            "'outside_mixer:Yours' is not a Mixer class; .*a class 'Yours'",
        ),
        ("mixers", Mixer, "outside_mixer:NOT_A_CLASS", "is not a Mixer class"),
        ("stages", Stage, "outside_mixer:Mine", "is not a Stage class; .*derives from linearize.stages.base.Stage"),
    ],
)
def test_errors(outside: Path, package: str, base: type, key: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find(package, key, base)
