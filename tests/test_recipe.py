"""Recipes: how they are found, overridden and validated, what every mistake says, and the shipped ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from linearize.errors import UserError
from linearize.model_names import ALIASES, resolve_model
from linearize.recipe import Recipe
from linearize.recipe_files import available
from linearize.registry import find, keys
from linearize.schema import parse_count
from linearize.stages.base import Stage

SMALL: dict[str, Any] = {
    "model": {"name": "demo"},
    "mixer": {"type": "lolcats", "window": 8},
    "data": {"source": "demo", "seq_len": 64},
    "stages": [
        {"type": "attention_transfer", "tokens": "20M"},
        {"type": "finetune", "tokens": 100, "lora": {}},
    ],
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def mistake(path: Path, *overrides: str) -> str:
    """What loading the recipe with these overrides complains about."""
    with pytest.raises(UserError) as caught:
        Recipe.load(path, overrides=overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mixr=1", "unknown key 'mixr'; did you mean 'mixer'? known: data, evaluation,"),
        ("model.nme=x", "unknown key 'model.nme'; did you mean 'name'?"),
        ("data.seq_length=1", "unknown key 'data.seq_length'; did you mean 'seq_len'?"),
        (
            "layers=",
            "layers: must be all, a pattern such as LLLS, numbers of layers, or {type: window_ablation}, got None",
        ),
        ("layers=[0, 1.5]", "layers: must be all, a pattern such as LLLS, numbers of layers, or"),
        ("mixer.windw=3", "unknown key 'mixer.windw'; did you mean 'window'?"),
        ("mixer.feature_map.dimm=3", "unknown key 'mixer.feature_map.dimm'"),
        ("stages.0.tokns=3", "unknown key 'stages.0.tokns'; did you mean 'tokens'?"),
        ("stages.1.lora.rank=3", "unknown key 'stages.1.lora.rank'; known: alpha, dora, dropout, merge, r, targets"),
        ("evaluation.window=3", "unknown key 'evaluation.window'; did you mean 'windows'?"),
        ("export.shard=3", "unknown key 'export.shard'"),
        ("mixer.type=lolcat", "unknown mixer 'lolcat'; did you mean 'lolcats'?"),
        ("mixer.type=missing_module_x:Mixer", "cannot import 'missing_module_x' for mixer"),
        (
            "mixer.type=linearize.losses:mse",
            "is not a Mixer class; linearize.losses must define a class 'mse'",
        ),
        ("mixer={}", "mixer.type is missing"),
        (
            "stages.0.type=atention_transfer",
            "unknown stage 'atention_transfer'; did you mean 'attention_transfer'?",
        ),
        ("stages=[{tokens: 1}]", "stages.0.type is missing"),
        ("mixer.window=0", "combine 'shared_denominator' needs a window; set window to at least 1 token"),
        ("mixer.window=wide", "mixer.window: "),
        ("stages.0.tokens=lots", "stages.0.tokens: 'lots' is not a count; write a number such as 20M"),
        ("stages.0.lr=-1", "stages.0.lr: Input should be greater than 0 (got -1)"),
        ("stages.0.batch_size=6 micro", "stages.0.batch_size: "),
        ("stages.0.micro_batch_size=3", "batch_size 8 is not a multiple of micro_batch_size 3"),
        ("model.name=null", "model.name: Input should be a valid string (got None)"),
        ("data=demo", "data: "),
        ("evaluation.probes=[[1]]", "probes.0 must be names of probes, or {type: name, ...}, got [1]"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(recipe_file: Path, override: str, message: str) -> None:
    assert message in mistake(recipe_file, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.tokens", "override 'stages.0.tokens' is not key=value, for example stages.0.tokens=20M"),
        ("=3", "override '=3' is not key=value"),
        ("mine.yaml", "override 'mine.yaml' is not key=value, give a recipe file as --recipe mine.yaml"),
        ("stages.2.tokens=3", "override 'stages.2.tokens': '2' is not one of the 2 items, counted from 0; *"),
        ("stages.first.tokens=3", "'first' is not one of the 2 items"),
        ("stages.2=3", "'2' is not one of the 2 items"),
        ("mixer.window.size=3", "override 'mixer.window.size': mixer.window is a int, it has no keys"),
        ("mixer.window.size.x=3", "'size' has no parent to go under"),
    ],
)
def test_a_wrong_override_is_named(recipe_file: Path, override: str, message: str) -> None:
    assert message in mistake(recipe_file, override)


def test_several_mistakes_are_reported_together(recipe_file: Path) -> None:
    message = mistake(recipe_file, "stages.0.tokns=3", "stages.0.lr=-1")
    assert "'stages.0.tokns'" in message and "stages.0.lr: " in message


def test_overrides_reach_lists_nested_sections_and_new_keys(recipe_file: Path) -> None:
    changes = [
        "stages.0.tokens=1.5k",
        "mixer.feature_map.dim=4",
        "layers=[0, 2]",
        "evaluation.windows=3",
        "seed=7",
    ]
    recipe = Recipe.load(recipe_file, overrides=changes)
    assert recipe.stages[0]["tokens"] == 1500
    assert recipe.mixer["feature_map"] == {"type": "hedgehog", "dim": 4} and recipe.mixer["window"] == 8
    assert recipe.layers == [0, 2] and recipe.seed == 7
    assert recipe.evaluation is not None and recipe.evaluation.windows == 3


def test_a_star_is_every_item_of_a_list(recipe_file: Path) -> None:
    plain = Recipe.load(recipe_file)
    recipe = Recipe.load(recipe_file, overrides=["stages.*.batch_size=3", "stages.*.data={recall_fraction: 0.5}"])
    changes = {"batch_size": 3, "data": {"recall_fraction": 0.5}}
    assert recipe.stages == [{**stage, **changes} for stage in plain.stages] and len(recipe.stages) == 2
    assert recipe.stages[0]["data"] is not recipe.stages[1]["data"]
    assert "stages.*.tokens has no say" in mistake(recipe_file, "tokens=10M", "stages.*.tokens=1M")


@pytest.mark.parametrize(
    ("text", "count"),
    [("20M", 20_000_000), ("1.5k", 1500), ("2b", 2 * 10**9), (" 300 ", 300), (7, 7), (".5M", 500_000)],
)
def test_counts(text: Any, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["20 million", "M", "-3", "1e6", ""])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ValueError, match="is not a count"):
        parse_count(text)


def test_recipes_are_found_by_name_model_and_path(recipe_file: Path) -> None:
    assert Recipe.load(model="llama-3-8b") == Recipe.load("default/auto", "llama-3-8b")
    by_hub_name = Recipe.load("liger", "meta-llama/Meta-Llama-3-8B")
    assert by_hub_name == Recipe.load("llama-3-8b/liger") and by_hub_name.mixer["type"] == "liger"
    own = Recipe.load(recipe_file, model="smollm2-135m")
    assert own.model.name == "smollm2-135m" and own.mixer["window"] == 8
    other = Recipe.load("lolcats", "someone/else")
    assert other.mixer == Recipe.load("default/lolcats", "someone/else").mixer and other.model.name == "someone/else"


def test_unknown_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown recipe 'lolcat'; did you mean 'lolcats'"):
        Recipe.load("lolcat", "demo")
    with pytest.raises(UserError, match=r"no recipe file '.*none.yaml'; known recipes: default/attention_to_mamba, "):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"model\.name: Field required"):
        Recipe.load("default/lolcats", overrides=["model.dtype=float32"])


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not valid YAML"), ("- a", "must hold a mapping of recipe keys")]
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        Recipe.load(tmp_path / "bad.yaml")


def test_model_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model("llama-3-8b") == ALIASES["llama-3-8b"] == "meta-llama/Meta-Llama-3-8B"
    assert resolve_model("owner/name") == "owner/name"
    assert (Path(resolve_model("demo")) / "model.safetensors").is_file()
    with pytest.raises(UserError, match="unknown model 'lama-3-8b'; did you mean 'llama-3-8b'"):
        resolve_model("lama-3-8b")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("folder") == "folder"


def test_a_folder_that_bears_a_short_name_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    taken = resolve_model("demo")
    assert not caplog.messages
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert resolve_model("demo") == resolve_model("demo") == taken
    (told,) = caplog.messages
    assert "the teacher inside the package" in told and told.endswith("that is ./demo")
    assert resolve_model("./demo") == "./demo"


def shipped(name: str) -> Recipe:
    return Recipe.load(name, "owner/name" if name.startswith("default/") else None)


@pytest.mark.parametrize("name", available())
def test_every_shipped_recipe_is_valid_and_reproduces_itself(name: str) -> None:
    recipe = shipped(name)
    method = name.split("/")[1]
    assert recipe.mixer["type"] == method or method not in keys("mixers")
    model = name.split("/")[0]
    assert model == "default" or resolve_model(recipe.model.name) == resolve_model(model)
    assert sum(stage["tokens"] for stage in recipe.stages) > 0
    assert find("stages", recipe.stages[-1]["type"], Stage).end_to_end != method.endswith("_encoder")
    text = recipe.to_yaml()
    again = Recipe.parse(yaml.safe_load(text))
    assert again == recipe and again.to_yaml() == text


@pytest.mark.parametrize("owner", ["default", "demo"])
def test_the_shipped_recipes_cover_every_mixer(owner: str) -> None:
    from linearize.registry import keys

    recipes = [Recipe.load(name, "demo") for name in available() if name.startswith(f"{owner}/")]
    assert {recipe.mixer["type"] for recipe in recipes} == set(keys("mixers")) - {"composed"}


def test_demo_recipes_are_measured_alike() -> None:
    """Prompts and their continuations are each one's own; no number depends on them."""
    recipes = {name: Recipe.load(name) for name in available() if name.startswith("demo/")}
    asked = {
        name: recipe.evaluation and recipe.evaluation.model_dump(exclude={"sample_prompt", "sample_tokens"})
        for name, recipe in recipes.items()
    }
    assert asked["demo/auto"] and all(how == asked["demo/auto"] for how in asked.values())


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: demo/lolcats\nmixer: {window: 32}\nevaluation: null\n")
    mine, base = Recipe.load(tmp_path / "mine.yaml"), Recipe.load("demo/lolcats")
    assert mine.mixer == {**base.mixer, "window": 32} and mine.stages == base.stages and mine.evaluation is None
    (tmp_path / "other.yaml").write_text("extends: mine.yaml\nmixer: gdn\n")
    assert Recipe.load(tmp_path / "other.yaml").mixer == Recipe.load("demo/gdn").mixer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: demo/lolcat", "extends 'demo/lolcat', which is no recipe; did you mean 'demo/lolcats'"),
        ("extends: loop.yaml", "extends 'loop.yaml', which extends it in turn"),
        ("extends: [a, b]", "extends must name one recipe"),
    ],
)
def test_a_wrong_parent_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "loop.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        Recipe.load(tmp_path / "loop.yaml")


def test_a_circle_of_recipes_is_found_by_any_path(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text("extends: sub/../b.yaml")
    (tmp_path / "b.yaml").write_text("extends: sub/../a.yaml")
    with pytest.raises(UserError, match="which extends it in turn"):
        Recipe.load(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text(f"extends: {'x' * 300}")
    with pytest.raises(UserError, match="which is no recipe"):
        Recipe.load(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mixer.decay=scalr", "unknown decay 'scalr'; did you mean 'scalar'"),
        ("mixer.update={type: delta, bta: 1}", "unknown key 'mixer.update.bta'; did you mean 'beta'"),
        ("mixer.update={type: delta, beta: 3}", "update.beta must lie between 0 and 1, got 3"),
        ("mixer.window=wide", "mixer.window: Input should be a valid integer"),
        ("mixer.combine=average", None),
    ],
)
def test_parts_are_named_and_checked(override: str, message: str | None) -> None:
    if message is None:
        assert Recipe.load("gdn", "demo", [override]).mixer["combine"] == {"type": "average", "mix": 0.5}
        return
    with pytest.raises(UserError, match=re.escape(message)):
        Recipe.load("gdn", "demo", [override])


def test_the_papers_settings_of_lolcats() -> None:
    transfer, finetune = Recipe.load("lolcats", "llama-3-8b").stages
    assert (transfer["tokens"], transfer["lr"], transfer["batch_size"], transfer["loss"]) == (
        20_000_000,
        1e-2,
        8,
        "mse",
    )
    assert (finetune["tokens"], finetune["lr"], finetune["batch_size"]) == (20_000_000, 1e-4, 8)
    assert (finetune["lora"]["r"], finetune["lora"]["alpha"]) == (8, 16)


@pytest.mark.parametrize("override", ["data.source=[oops", "data.source='x"])
def test_an_override_that_is_not_yaml(override: str) -> None:
    with pytest.raises(UserError, match="the value is not valid YAML"):
        Recipe.load("lolcats", "demo", [override])


def test_an_override_says_why_it_is_not_yaml() -> None:
    with pytest.raises(UserError, match="not valid YAML: key 'name' is there twice"):
        Recipe.load("lolcats", "demo", ["model={name: demo, name: demo}"])


@pytest.mark.parametrize("text", [b"model: \xff\xfe", b"model: x\n"])
def test_a_recipe_file_that_is_not_one(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(text)
    with pytest.raises(UserError, match=r"r\.yaml"):
        Recipe.load(tmp_path / "r.yaml", "demo")


@pytest.mark.parametrize("override", ["stages.0.lr=.inf", "export.max_shard_size=foo", "export.max_shard_size=0GB"])
def test_values_that_would_fail_only_after_training(override: str) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0].replace(".", "[.]")):
        Recipe.load("lolcats", "demo", [override])


def test_stages_share_a_budget() -> None:
    recipe = Recipe.load("auto_linear", model="demo", overrides=["tokens=11k"])
    assert [stage["tokens"] for stage in recipe.stages] == [7000, 4000]
    assert "tokens" not in yaml.safe_load(recipe.to_yaml())  # so that the resolved form shares nothing again
    kept = Recipe.load("default/halo", model="demo", overrides=["tokens=1420M"])
    assert kept.stages == Recipe.load("default/halo", model="demo").stages


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages=[]"], "tokens=10 is shared by the stages that train, and there are none; leave tokens out"),
        (["stages=[{type: qk_restore}]"], "tokens=10 is shared by the stages that train, and there are none"),
        (["stages.0.tokens=5000M"], "stages.0.tokens has no say beside it; give one of them"),
        ([], "tokens=10 leaves nothing for the shortest stage; give at least 15"),
    ],
)
def test_budgets_that_cannot_be_shared(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe.load("default/halo", model="demo", overrides=["tokens=10", *overrides])


def test_a_stream_is_read_as_far_as_the_stages_need() -> None:
    """Otherwise a recipe of 40M tokens would prepare all ten billion of a corpus first."""
    stages = [
        {"type": "attention_transfer", "tokens": 1000, "batch_size": 4, "seq_len": 64},
        {"type": "logit_kl", "tokens": 1001, "batch_size": 2},
        {"type": "logit_kl", "tokens": 700, "batch_size": 2, "data": {"recall_fraction": 0.5}},
        {"type": "logit_kl", "tokens": 5000, "batch_size": 2, "data": {"max_tokens": 300}},
        {"type": "qk_restore"},
    ]

    def recipe(stages: list[dict[str, Any]] = stages, **data: Any) -> Recipe:
        text = {"source": "someone/fish", "seq_len": 128, "streaming": True, **data}
        init = {"type": "calibrated", "tokens": 4096}
        return Recipe.parse({"model": {"name": "demo"}, "mixer": "gdn", "data": text, "stages": stages, "init": init})

    bounded = recipe()
    assert [bounded.stage_data(s).max_tokens for s in bounded.stages[:4]] == [1024, 2**20, 768, 300]
    assert bounded.source_data() == bounded.stage_data(bounded.stages[1])  # prepared once for both
    long = [{"type": "logit_kl", "tokens": 2**20 + 1, "batch_size": 2}]
    assert recipe(long).source_data().max_tokens == 2**20 + 256
    assert recipe(recall_fraction=0.2).source_data().max_tokens == 2**20  # plain text, which no stage trains on
    assert recipe(recall_fraction=0.2).source_data().recall_fraction == 0
    assert recipe(streaming=False).source_data().max_tokens is None
    on_disk = recipe(streaming=False)  # where recall documents would be ten times as much as the text
    assert [on_disk.stage_data(s).max_tokens for s in on_disk.stages[:4]] == [None, None, 768, 300]
    assert recipe(max_tokens=5000).source_data().max_tokens == 5000


def test_shipped_stages_leave_the_end_of_a_stream_to_their_budget() -> None:
    for name in available():
        stages = Recipe.load(name, model="demo").stages
        assert not any("max_tokens" in (stage.get("data") or {}) for stage in stages), name


UNFIT = [
    ("stages.1.betas=[0.9,1.0]", "stages.1.betas.1: .*less than 1"),
    ("data.seed=-1", "data.seed: .*greater than or equal to 0"),
    ("seed=99999999999999999999999999", "seed: .*less than 18446744073709551616"),
    ("stages.1.seed=99999999999999999999999999", "stages.1.seed: .*less than 18446744073709551616"),
    ('evaluation={sample_prompt: ""}', "evaluation.sample_prompt: .*at least 1 character"),
    ("model.attn_implementation=foo", "model.attn_implementation: unknown attention kernel, got 'foo'; known: eager, "),
    ("stages.0.type=linearize.stages.base:Stage", "'linearize.stages.base:Stage' has no Config"),
    ("stages.0.lr=true", "stages.0.lr: must be a number, got true"),
    ("stages.0.tokens=true", "stages.0.tokens: must be a number, got true"),
    ("data.limit_documents=true", "data.limit_documents: must be a number, got true"),
    ("stages.1.lora.r=true", "r: must be a number, got true"),
    ("mixer.window=true", "mixer.window: must be a number, got true"),
    ("layers=[true]", "layers: must be a number, got true"),
]


@pytest.mark.parametrize(("text", "message"), UNFIT, ids=[text for text, _ in UNFIT])
def test_values_that_would_fail_later_are_refused(recipe_file: Path, text: str, message: str) -> None:
    assert re.search(message, mistake(recipe_file, text))


def test_truths_stay_where_they_mean_something(recipe_file: Path) -> None:
    recipe = Recipe.load(recipe_file, overrides=["evaluation={recall: true}", "data.packing=false"])
    assert recipe.evaluation is not None and recipe.evaluation.recall is True and recipe.data.packing is False


def test_a_length_of_a_stage_may_have_a_unit(recipe_file: Path) -> None:
    assert Recipe.load(recipe_file, overrides=["stages.0.seq_len=4k"]).stages[0]["seq_len"] == 4000


def test_a_key_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("mixer: gdn\ndata:\n  seq_len: 64\n  split: dev\n  seq_len: 128\n")
    assert "key 'seq_len' is there twice, in lines 3 and 5" in mistake(path)
