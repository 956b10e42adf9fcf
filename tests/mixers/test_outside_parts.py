"""Parts from outside: named `module:Class`, built as they are, of the right kind, never in another's place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from linearize.errors import UserError
from linearize.mixers.composed import Composed
from linearize.mixers.parts.updates.delta import Delta
from linearize.recipe import Recipe
from linearize.recipe_plugins import mixer_config

HEAD = (
    "from dataclasses import dataclass\n"
    "from linearize.mixers.parts.updates.delta import Delta, DeltaConfig\n"
    "from linearize.mixers.parts.updates.rwkv7 import Rwkv7, Rwkv7Config\n"
)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Factory (code) -> name of a module with it."""

    def make(code: str) -> str:
        name = f"outside_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{name}.py").write_text(HEAD + code)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return make


def settings(update: object) -> dict[str, object]:
    return {"type": "gdn", "update": update}


def test_a_part_of_ones_own_is_what_is_built(module: Callable[[str], str]) -> None:
    name = module(
        "@dataclass(frozen=True)\nclass MineConfig(DeltaConfig):\n    pass\n\n"
        "class Mine(Delta):\n    Config = MineConfig\n"
    )
    config = mixer_config(settings(f"{name}:Mine"))
    assert config.update.part.__name__ == "Mine" and config.update.type == f"{name}:Mine"
    assert mixer_config({"type": "gdn"}).update.part is Delta


def test_a_part_without_a_config_of_its_own_is_refused(module: Callable[[str], str]) -> None:
    name = module("class Mine(Delta):\n    pass\n")
    with pytest.raises(UserError, match="has the Config of Delta, which would be built in its place"):
        mixer_config(settings(f"{name}:Mine"))


def test_a_part_cannot_take_the_config_of_another(module: Callable[[str], str]) -> None:
    name = module("class Mine(Delta):\n    Config = DeltaConfig\n")
    with pytest.raises(TypeError, match="Mine.Config is DeltaConfig, which belongs to"):
        mixer_config(settings(f"{name}:Mine"))
    assert mixer_config({"type": "gdn"}).update.part is Delta


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mixer.decay=null", "mixer.decay must be the name of a part.*a part that does nothing is called none"),
        ("mixer.decay=5", "mixer.decay must be the name of a part, or its settings with a type, got 5"),
        ("mixer.decay=[scalar]", r"got \['scalar'\]"),
        ("mixer.decay=false", "got False; a part that does nothing is called none"),
        ("mixer.decay=off", "unknown decay 'off'; known: fixed, from_k, low_rank, none"),
        ("mixer.decay={type: 5}", "mixer.decay must be the name of a part"),
        ("mixer.update={type: memories, inner: null}", "mixer.update.inner must be the name"),
        ("mixer.update={type: memories, inner: ttt}", "update.inner 'ttt' counts tokens or reads more than its state"),
        (
            "mixer.update={type: memories, inner: 'linearize.mixers.parts.updates.rwkv7:Rwkv7'}",
            "counts tokens or reads more than its state",
        ),
        ("mixer.update=linearize.mixers.parts.decays.fixed:Fixed", "is not a Update class"),
        ("mixer.decay=..:X", "is not `module:Class`, names joined by dots and one colon"),
        ("mixer.decay={type: scalar, half_life: [.nan, 1]}", "two positive numbers of tokens"),
        ("mixer.decay={type: low_rank, normalizer: .inf}", "decay.normalizer must be positive"),
        ("mixer.conv.size=1000", "conv.size must lie between 0 and 128"),
        ("init.tokens=0", "init.tokens: Input should be greater than 0"),
        ("mixer.decay={5: 1}", "unknown key 'mixer.decay.5'"),
    ],
)
def test_what_is_no_part_is_refused_when_the_recipe_is_read(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe.load("gdn", "demo", [override])


def test_every_kind_of_part_is_refused_in_the_place_of_another() -> None:
    from linearize.registry import find_class

    assert issubclass(find_class("mixers", "composed"), Composed)
    places = {
        "feature_maps": "feature_maps.silu:Silu",
        "decays": "decays.none:NoDecay",
        "updates": "updates.delta:Delta",
        "combines": "combines.sum:Sum",
    }
    for package in places:
        for kind, part in places.items():
            key = f"linearize.mixers.parts.{part}"
            if kind == package:
                find_class(f"mixers.parts.{package}", key)
            else:
                with pytest.raises(UserError, match="is not a "):
                    find_class(f"mixers.parts.{package}", key)
