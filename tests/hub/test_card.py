"""A model card's metadata: true, valid for the hub's own tools, and nothing invented."""

from __future__ import annotations

import argparse
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from linearize.cli._arguments import add_recipe_arguments, load_recipe
from linearize.demo import model_path
from linearize.errors import UserError
from linearize.evals.divergence import Divergence
from linearize.evals.items import Asked
from linearize.evals.measure import Measurement
from linearize.evals.recall_score import RecallScore
from linearize.evals.text import TextLoss
from linearize.families.base import Family
from linearize.hub.card import model_card
from linearize.hub.card_data import for_repository, pipeline_tag, source_metadata
from linearize.hub.card_results import eval_results, held_out, merged
from linearize.hub.licence import licence_files
from linearize.plan import make_plan
from linearize.preflight import plan_of
from linearize.recipe import Recipe
from linearize.registry import find, keys


def measured() -> Measurement:
    recall = [RecallScore(1, 200, 0.5, 16), RecallScore(4, 1700, None, 0, skipped="too long")]
    tasks = {
        "piqa": {"acc": 0.61, "acc_stderr": 0.02, "acc_norm": 0.63, "acc_norm_stderr": math.nan},
        "gsm8k": {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.01, "broken": math.nan},
    }
    losses = [TextLoss(64, 3.25, 63, 1, ()), TextLoss(128, 3.5, 254, 2, ())]
    return Measurement(losses=losses, recall=recall, tasks=tasks, divergence=[Divergence(64, 0.125, 0.25)])


@pytest.fixture
def source(pico_model: Any, tmp_path: Path) -> Path:
    pico_model().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def card_of(
    name: str, config: Any = None, *overrides: str, student: Measurement | None = None, recipe: Any = "lolcats"
) -> str:
    recipe = Recipe.load(recipe, name, list(overrides))
    plan = plan_of(recipe) if config is None else make_plan(recipe, config)
    points = {} if student is None else {"teacher": Measurement(), "after finetune": student}
    return model_card(recipe, plan, points)


def test_results_are_read_back_as_they_were_measured(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card_of("demo", student=measured()))
    data = ModelCard.load(tmp_path / "README.md").data
    assert isinstance(data, ModelCardData) and data.eval_results is not None and data.model_name == "demo-lolcats"
    found = {(r.dataset_name, r.metric_type, r.metric_name): (r.metric_value, r.metric_args) for r in data.eval_results}
    by_value = {value: args for value, args in found.values()}
    assert by_value == {
        3.25: {"length": 64, "windows": 1},
        3.5: {"length": 128, "windows": 2},
        0.125: {"length": 64, "windows": 1, "teacher": "demo"},
        0.5: {"facts": 1, "distance": 200, "questions": 16},
        0.61: {"stderr": 0.02},
        0.63: None,
        0.25: {"stderr": 0.01},
    }
    assert {r.dataset_name for r in data.eval_results} == {"demo", "Synthetic recall", "piqa", "gsm8k"}
    assert {r.dataset_split for r in data.eval_results if r.metric_type == "loss"} == {"dev"}
    again = ModelCardData(**{**metadata_load(tmp_path / "README.md")})
    assert again.eval_results == data.eval_results


def test_the_demo_has_its_licence_and_no_base_on_the_hub() -> None:
    data = ModelCard(card_of("demo")).data
    assert (data.license, data.language, data.pipeline_tag) == ("apache-2.0", "en", "text-generation")
    assert data.base_model is None and "base_model_relation" not in data and data.eval_results is None
    assert data.tags == ["linearize", "linear-attention", "lolcats"] and data.datasets is None


def test_a_hub_source_is_the_base_and_its_licence_is_not_invented(pico_config: Any) -> None:
    card = card_of("ada/pico", pico_config(), "data.source=lab/books", "data.name=small", student=measured())
    data = ModelCard(card).data
    assert (data.base_model, data.base_model_relation) == ("ada/pico", "finetune")
    assert data.license is None and data.language is None  # there is no network in tests
    assert data.datasets == ["lab/books"]
    (loss, *_) = [r for r in data.eval_results if r.metric_type == "loss"]
    assert (loss.dataset_type, loss.dataset_config) == ("lab/books", "small")


def test_what_a_local_source_says_is_copied(source: Path) -> None:
    assert source_metadata(str(source)) == {}
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: x\nlicense_link: L\nwidget: []\n---\n")
    assert source_metadata(str(source)) == {"license": "other", "license_name": "x"}  # the link leads nowhere
    for broken in ("no metadata", "---\nlicense: [\n---\n", "---\n- a list\n---\n"):
        (source / "README.md").write_text(broken)
        assert source_metadata(str(source)) == {}
    assert source_metadata(str(model_path()))["license"] == "apache-2.0"


def test_paths_of_this_machine_are_no_names_of_results(tmp_path: Path) -> None:
    (result, *_) = eval_results(measured(), **held_out(str(tmp_path / "held-out.jsonl"), "train", "lab/books", "small"))
    assert result.dataset_name == result.dataset_type == "held-out.jsonl"
    assert result.dataset_split is None and result.dataset_config is None, "a file is read whole"
    (result, *_) = eval_results(measured(), **held_out(None, "test", "lab/books", "small"))
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("lab/books", "small", "test")


def asked(**tasks: Asked) -> Measurement:
    return Measurement(tasks={task: {"acc": 0.5} for task in tasks}, asked=tasks)


def test_limited_and_own_questions_are_no_benchmark() -> None:
    whole, part = Asked(1838, 1838, 0, own=False), Asked(50, 1838, 0, own=False)
    results = eval_results(asked(piqa=whole, copa=part, boolq=Asked(9, 9, None, own=True)), text="demo", split="dev")
    results += eval_results(Measurement(tasks={"wsc": {"acc": 0.5}}), text="demo", split="dev", limit=7)
    found = {r.dataset_type: r for r in results}
    assert found.keys() == {"piqa", "copa-first-50", "own-boolq", "wsc-first-7"}
    assert found["piqa"].dataset_name == "piqa" and found["piqa"].metric_name == "acc (0-shot, lm-evaluation-harness)"
    assert found["piqa"].metric_args == {"num_few_shot": 0, "questions": 1838}
    assert found["copa-first-50"].dataset_name == "copa (only 50 of 1,838 questions)"
    assert "only 50 of 1,838 questions" in (found["copa-first-50"].metric_name or "")
    assert "own questions, not the benchmark's" in found["own-boolq"].dataset_name
    assert found["wsc-first-7"].dataset_name == "wsc (only 7 of all questions)"
    card = card_of("demo", student=asked(piqa=whole, copa=part))
    assert "- copa: only 50 of 1,838 questions." in card and "- piqa" not in card
    kinds = [result.dataset_type for result in ModelCard(card).data.eval_results or []]
    assert sorted(kinds) == ["copa-first-50", "piqa"]


def test_of_equal_measurements_the_last_one_counts() -> None:
    first, more = (
        Measurement(losses=[TextLoss(64, 3.0, 63, 1, ())]),
        Measurement(losses=[TextLoss(64, 2.5, 126, 2, ())]),
    )
    again = Measurement(losses=[TextLoss(64, 2.75, 63, 1, ())], tasks={"piqa": {"acc": 0.5, "acc_stderr": 0.1}})
    other = Measurement(tasks={"piqa": {"acc": 0.75, "acc_stderr": 0.2}})
    results = [r for m in (first, more, again, other) for r in eval_results(m, text="demo", split="dev")]
    assert [r.metric_value for r in merged(results)] == [2.75, 2.5, 0.75]
    elsewhere = eval_results(first, text="demo", split="train")
    assert len(merged([*results, *elsewhere])) == 4
    card = for_repository(
        card_of("demo", student=measured()),
        "ada/x",
        results=eval_results(measured(), text="demo", split="dev", teacher="demo"),
    )
    assert len(ModelCard(card).data.eval_results or []) == 7


@pytest.mark.parametrize(
    ("teacher", "shown"),
    [
        ("demo", "demo"),
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("ada/other", "ada/other"),
        ("/mnt/ada/secret/other", "other"),
        ("", "the teacher"),
    ],
)
def test_a_divergence_names_the_model_it_is_from(teacher: str, shown: str, tmp_path: Path) -> None:
    on: dict[str, Any] = {"text": "demo", "split": "dev"}
    kl = [r for r in eval_results(measured(), **on, teacher=teacher or None) if r.metric_type == "kl_divergence"]
    assert [r.metric_name for r in kl] == [f"KL to {shown} at 64 tokens (nats)"]
    assert (kl[0].metric_args or {}).get("teacher", "the teacher") == shown
    own = [r for r in eval_results(measured(), **on, teacher="ada/own") if r.metric_type == "kl_divergence"]
    assert len(merged([*own, *kl])) == 2, "another teacher is another measurement"


def test_licences_beside_a_local_source_go_along(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: x\nlicense_link: ./LICENSE.md\n---\n")
    names = ("LICENSE.md", "Notice", "USE_POLICY.md")
    for name in names:
        (source / name).write_bytes(b"LLAMA 3 COMMUNITY LICENSE\n\xff")
    (source / "license.key").write_text("private")
    assert licence_files(source).keys() == set(names) and licence_files("ada/on-the-hub") == {}
    told = {"license": "other", "license_name": "x", "license_link": "LICENSE.md"}
    assert source_metadata(str(source)) == told
    (source / "README.md").write_text("---\nlanguage: en\n---\n")
    named = {**told, "license_name": "llama-3-community-license"}
    assert source_metadata(str(source)) == {**named, "language": "en"}
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert source_metadata(str(source)) == {"license": "apache-2.0"}
    (tmp_path / "private").write_text("private")
    (source / "LICENSE").symlink_to(tmp_path / "private")
    assert "LICENSE" not in licence_files(source)
    (cached := tmp_path / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_text("theirs")
    (cached / "LICENSE").symlink_to("../../blobs/1")
    assert licence_files(cached) == {"LICENSE": b"theirs"}


def test_the_card_names_its_recipe_and_how_to_follow_it(source: Path, tmp_path: Path) -> None:
    card = card_of("demo", None, "layers=LLLLLS", "stages.0.tokens=2M")
    assert "`demo/lolcats` of linearize" in card and "with `layers=LLLLLS stages.0.tokens=2M`" in card
    (line,) = [line for line in card.splitlines() if line.startswith("linearize convert")]
    _, _, *arguments = shlex.split(line)
    options = argparse.ArgumentParser()
    add_recipe_arguments(options)
    assert load_recipe(options.parse_args(arguments)) == Recipe.load("lolcats", "demo", arguments[4:])
    file = tmp_path / "mine.yaml"
    file.write_text("extends: default/lolcats\nmixer: {window: 32}\n")
    recipe = Recipe.load(file, str(source))
    card = model_card(recipe, plan_of(recipe), {})
    assert "The author's own, `mine.yaml`, for linearize" in card and "`source` is the source model's folder" in card
    assert "linearize convert --model source --recipe recipe.yaml\n" in card
    assert "# source, linearized with lolcats" in card
    (title,) = re.findall("^# (.*)", card_of("demo", recipe="auto", student=measured()), re.M)
    what = "delta rule on hedgehog features beside a softmax window of 256 tokens"
    assert title == f"demo, linearized with recipe auto ({what})"
    assert "model_name" not in card and "name: demo-auto\n" in card_of("demo", recipe="auto", student=measured())
    assert "# demo, linearized with gdn\n" in card_of("demo", recipe="gdn")
    file.write_text("extends: default/auto\n")
    own = Recipe.load(file, "demo")
    card = model_card(own, plan_of(own), {})
    assert f"# demo, linearized with {what}\n" in card
    assert f"by the `gdn` mixer (here: {what}) and trained" in card
    parsed = Recipe.parse(recipe.model_dump(mode="json"))
    assert "The author's own, for linearize" in model_card(parsed, plan_of(parsed), {})


def test_every_family_has_a_task() -> None:
    tags = {key: pipeline_tag(find("families", key, Family).auto_class) for key in keys("families")}
    assert tags["llama"] == "text-generation" and tags["llava"] == "image-text-to-text"
    assert tags["bert"] == "feature-extraction" and None not in tags.values()


def test_a_card_in_a_repository_names_it_and_keeps_what_was_written() -> None:
    card = card_of("demo", student=measured())
    card = card.replace("license: apache-2.0", "license: mit").replace("## Recipe", "My own words.\n\n## Recipe")
    pushed = for_repository(card, "ada/small")
    data = ModelCard(pushed).data
    assert data.license == "mit" and data.model_name == "small" and len(data.eval_results) == 7
    assert "# ada/small: demo, linearized" in pushed and 'path = "ada/small"' in pushed and "My own words." in pushed
    assert "path/to/this/folder" not in pushed
    more = eval_results(Measurement(tasks={"copa": {"acc": 0.5}}), text="demo", split=None)
    assert len(ModelCard(for_repository(card, "ada/small", results=more)).data.eval_results) == 8
    assert for_repository("# Plain\n", "ada/small") == "# ada/small: Plain\n"
    with pytest.raises(UserError, match="metadata at the top of README.md cannot be read"):
        for_repository("---\nlicense: [\n---\ntext", "ada/small")


def test_an_adapter_says_what_it_belongs_to() -> None:
    card = card_of("demo", None, "stages.1.lora.merge=false")
    assert 'PeftModel.from_pretrained(model, path, subfolder="adapter")' in card and "import PeftModel" in card
    pushed = for_repository(card, "ada/lora", adapter_of="ada/whole")
    assert 'path = "ada/whole"' in pushed and 'PeftModel.from_pretrained(model, "ada/lora")' in pushed
    data = ModelCard(pushed).data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("ada/whole", "adapter", "peft")
    assert "path/to/the/converted/checkpoint" in for_repository(card, "ada/lora", adapter_of="")
