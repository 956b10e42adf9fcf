"""Names of groups of parameters mean the same in every family, and count in the order in which they were written."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
from pico import KEYS, find_family
from trainable import make_stage

from linearize import registry
from linearize.errors import UserError
from linearize.stages.base import Stage
from linearize.swap import swapped
from linearize.training.names import groups


def found(model: Any, patterns: list[str]) -> set[str]:
    return {name for name, _ in model.named_parameters() for pattern in patterns if fnmatch.fnmatchcase(name, pattern)}


@pytest.mark.parametrize("key", KEYS)
def test_groups_of_every_family(converted: Any, key: str) -> None:
    model = converted("lolcats", "LSL", family=key, tie_word_embeddings=False)
    family = next(iter(swapped(model).values())).family
    own = {name for name, _ in model.named_parameters()}
    named = {name: found(model, patterns) for name, patterns in groups(family).items()}
    layers = tuple(f"{name}." for name in family.attentions(model))
    assert len(layers) == 3 and named["all"] == own
    assert named["attention"] == {name for name in own if name.startswith(layers)}
    assert named["mixer"] == {name for name in own if ".mixer." in name} and named["mixer"]
    assert named["projections"] == set().union(*(named[short] for short in family.lora_targets))
    for short in family.lora_targets:
        assert named[short] < named["attention"] - named["mixer"]
        assert {name.split(".mixer.")[0] for name in named[short]} == named[short], "none of the mixer's own"
        for layer in layers:
            assert any(name.startswith(layer) for name in named[short]), (short, layer)


def test_the_last_name_or_pattern_counts() -> None:
    lrs = {"*.mixer.*": 1.0, "attention": 2.0, "mixer": 3.0, "v": 4.0}
    stage = make_stage("finetune", train=["all"], lr=0.5, lrs=lrs)
    rates = {
        "model.layers.0.self_attn.mixer.map_q.weight": 3.0,
        "model.layers.0.self_attn.q_proj.weight": 2.0,
        "model.layers.0.self_attn.v_proj.weight": 4.0,
        "model.layers.0.mlp.up_proj.weight": 0.5,
    }
    assert {name: stage.lr_scale(name) * 0.5 for name in rates} == rates


def test_stages_train_groups_and_name_them(converted: Any) -> None:
    model = converted("lolcats", "LSL")
    stage = make_stage("finetune", train=["q", "mixer"])
    assert {name.split(".")[4] for name in stage.prepare(model)} == {"q_proj", "mixer"}
    said = r"'mixers' matches nothing that trains; did you mean 'mixer'\? .* groups are all, mixer, attention, "
    with pytest.raises(UserError, match=said):
        make_stage("finetune", train=["mixers"]).check(model)
    for pattern in ("*.mixers.*", "experts"):
        with pytest.raises(UserError, match="matches nothing that trains; names look like"):
            make_stage("finetune", train=[pattern]).check(model)


def test_a_stage_leaves_the_recipes_settings_as_they_are() -> None:
    cls = registry.find("stages", "finetune", Stage)
    config = cls.Config(tokens=1, train=["all"])
    assert cls(config, find_family("gpt2")).config.train == ["*"] and config.train == ["all"]
