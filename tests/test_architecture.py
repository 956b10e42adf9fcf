"""What a mixer is called once a recipe has changed its parts."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from linearize.architecture import architecture
from linearize.mixers.base import Mixer
from linearize.recipe import Recipe
from linearize.registry import find_class, keys


@dataclass(frozen=True)
class Sized:
    size: int


class Own(Mixer):
    Config = Sized


@pytest.mark.parametrize("key", [key for key in keys("mixers") if key != "composed"])
def test_a_mixer_as_it_ships_has_its_own_name(key: str) -> None:
    assert architecture(Recipe.load("lolcats", "demo", [f"mixer={key}"]).mixer) == key


@pytest.mark.parametrize(
    ("mixer", "name"),
    [
        ("{type: gdn, decay: none}", "delta rule"),
        ("{type: gdn, feature_map: hedgehog}", "gdn on hedgehog features"),
        ("{type: gdn, window: 64}", "gdn beside a softmax window of 64 tokens"),
        ("{type: lolcats, window: 128}", "lolcats"),
        ("{type: mamba2, decay: {type: fixed}}", "linear attention with a fixed decay"),
        (
            "{type: liger, update: slots}",
            "gated slot attention on softmax features beside a softmax window of 64 tokens",
        ),
        ("{type: liger, window: 0, combine: sum}", "liger without a window"),
        ("{type: composed, update: delta, decay: scalar}", "gated delta rule"),
    ],
)
def test_other_parts_are_told(mixer: str, name: str) -> None:
    assert architecture(Recipe.load("lolcats", "demo", [f"mixer={mixer}"]).mixer) == name


@pytest.mark.parametrize("key", keys("mixers.parts.updates"))
def test_every_update_has_a_name(key: str) -> None:
    assert find_class("mixers.parts.updates", key).title  # type: ignore[attr-defined]


def test_nothing_is_imported_for_a_name() -> None:
    parts = {"update": {"type": "this:Update"}, "decay": {"type": "this:Decay"}}
    assert architecture({"type": "this:Mixer", **parts}) == "update this:Update"
    assert architecture({"type": "gdn", **parts}) == "update this:Update" and "this" not in sys.modules


def test_a_mixer_of_ones_own_that_needs_settings_is_called_as_in_the_recipe() -> None:
    assert architecture({"type": f"{__name__}:Own", "size": 3}) == f"{__name__}:Own"
