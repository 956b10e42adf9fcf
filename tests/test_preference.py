"""Preference pairs: what is prompt and what reply, cutting, dropping, the cache, and stages' data of their own."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainable import make_recipe, metrics, write_pairs, write_source
from transformers import AutoTokenizer

import linearize
import linearize.data.dataset
from linearize import demo, pipeline
from linearize.data import DataConfig, batches, prepare, read_tokens
from linearize.data.preference import fitted
from linearize.errors import UserError
from linearize.pipeline import convert
from linearize.preflight import plan_of

PAIR = {"prompt": "Name a fish.", "chosen": " Carp.", "rejected": " Cow, of course."}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.model_path())


@pytest.fixture
def make(tmp_path: Path, tokenizer: Any) -> Callable[..., Any]:
    """Factory (rows, **config) -> PackedDataset of a file with these rows, in order, 32 tokens a row."""

    def build(rows: list[dict[str, Any]], tokenizer: Any = tokenizer, **overrides: Any) -> Any:
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {"source": str(tmp_path / "in.jsonl"), "format": "preference", "seq_len": 32, "shuffle": False}
        return prepare(DataConfig(**{**values, **overrides}), tokenizer, cache_dir=tmp_path / "cache")

    return build


def read(batch: dict[str, torch.Tensor], tokenizer: Any, row: int) -> tuple[str, str]:
    """Prompt and reply of a row, whose prompt is not scored."""
    ids, labels = batch["input_ids"][row], batch["labels"][row]
    mask = batch["attention_mask"][row].bool() if "attention_mask" in batch else torch.ones_like(ids).bool()
    assert mask.tolist() == sorted(mask.tolist(), reverse=True), "padding is on the right"
    assert (labels[~mask] == -100).all() and torch.equal(labels[labels != -100], ids[labels != -100])
    scored = (labels != -100) & mask
    return tokenizer.decode(ids[mask & ~scored]), tokenizer.decode(ids[scored])


def test_texts_with_a_prompt(make: Callable[..., Any], tokenizer: Any) -> None:
    data = make([PAIR, {**PAIR, "prompt": "Name two."}])
    assert len(data) == 2 and data.item_rows == 2 and data.item_tokens == 64
    batch = data.batch([1, 0])
    assert batch["input_ids"].shape == (4, 32) and batch["position_ids"].tolist() == [list(range(32))] * 4
    assert read(batch, tokenizer, 2) == ("Name a fish.", " Carp.<|endoftext|>")
    assert read(batch, tokenizer, 3) == ("Name a fish.", " Cow, of course.<|endoftext|>")
    assert read(batch, tokenizer, 0) == ("Name two.", " Carp.<|endoftext|>")
    assert data.info["documents"] == 2 and data.tokens == int(batch["attention_mask"].sum())
    with pytest.raises(IndexError):
        data.batch([2])


def test_dialogues_of_anthropic(make: Callable[..., Any], tokenizer: Any) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Ha\n\nHuman: Why?\n\nAssistant:"
    parted = {"chosen": f"{start} Yes\n\nHuman: So?\n\nAssistant: No", "rejected": f"{start} No"}
    data = make([parted, {"chosen": f"{start} Because.", "rejected": f"{start} Be off."}], seq_len=64)
    batch = data.batch([0])
    assert len(data) == 1 and data.info["unclear"] == 1
    assert read(batch, tokenizer, 0) == (start, " Because.<|endoftext|>")
    assert read(batch, tokenizer, 1) == (start, " Be off.<|endoftext|>")


TURN = {"role": "user", "content": "Hi"}
REPLIES = {"chosen": {"role": "assistant", "content": "Yo"}, "rejected": {"role": "assistant", "content": "No"}}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", **{key: [TURN, reply] for key, reply in REPLIES.items()}},
        {"prompt": [TURN], **{key: [reply] for key, reply in REPLIES.items()}},
        {"prompt": "Hi", **{key: [reply] for key, reply in REPLIES.items()}},
        {"chosen": [{"from": "human", "value": "Hi"}, REPLIES["chosen"]], "rejected": [TURN, REPLIES["rejected"]]},
    ],
    ids=["ultrafeedback", "explicit", "text prompt", "sharegpt"],
)
def test_messages(make: Callable[..., Any], tmp_path: Path, row: dict[str, Any]) -> None:
    if isinstance(row["chosen"][0].get("from"), str):  # Arrow wants one structure for the whole column
        row = {**row, "rejected": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "No"}]}
        row["chosen"] = [row["chosen"][0], {"from": "gpt", "value": "Yo"}]
    plain = AutoTokenizer.from_pretrained(demo.model_path())
    batch = make([row], plain).batch([0])
    assert read(batch, plain, 0) == ("user: Hi\nassistant:", " Yo\n<|endoftext|>")
    templated = AutoTokenizer.from_pretrained(demo.model_path())
    templated.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    batch = make([row], templated).batch([0])
    assert read(batch, templated, 0) == ("[user]Hi[/][assistant]", "Yo[/]<|endoftext|>")
    assert read(batch, templated, 1) == ("[user]Hi[/][assistant]", "No[/]<|endoftext|>")


def test_a_template_that_rewrites_turns_is_refused(make: Callable[..., Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"rewrites earlier turns.*pairs of texts"):
        make([{key: [TURN, reply] for key, reply in REPLIES.items()}], tokenizer)


def test_long_prompts_are_cut_on_the_left_and_alike_for_both() -> None:
    prompt = list(range(10, 20))
    assert fitted((prompt, [1, 2], [3]), 12, []) == (prompt, [1, 2], [3])
    assert fitted((prompt, [1, 2], [3]), 8, []) == (prompt[-6:], [1, 2], [3])
    assert fitted(([5, *prompt], [1, 2], [3]), 8, [5]) == ([5, *prompt[-5:]], [1, 2], [3])
    assert fitted((prompt, [1, 2], [3]), 3, []) == (prompt[-1:], [1, 2], [3])
    assert fitted((prompt, [1, 2], [3]), 2, []) is None
    assert fitted(([5, *prompt], [1, 2], [3]), 3, [5]) is None, "nothing but the beginning of the sequence"
    assert fitted(([], [1, 2], [3]), 8, []) is None


def test_what_cannot_be_used_is_dropped_and_told(make: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    long = {**PAIR, "rejected": " moo" * 40}
    with caplog.at_level(logging.INFO, "linearize"):
        data = make([PAIR, long, {**PAIR, "rejected": PAIR["chosen"]}, {**PAIR, "chosen": None}])
    assert len(data) == 1 and data.info["long"] == 1 and data.info["unclear"] == 2
    assert "3 pairs of " in caplog.text and "1 whose longer reply leaves no room" in caplog.text
    with pytest.raises(
        UserError, match=r"no usable pair: 1 whose longer reply leaves no room .* seq_len=32, 0 without"
    ):
        make([long])


def test_pairs_stay_together_in_shards_limits_and_batches(
    make: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linearize.data.dataset, "_SHARD_TOKENS", 160)
    rows = [{**PAIR, "prompt": f"Name {n} fish."} for n in range(9)]
    data = make(rows, shuffle=True)
    assert len(data.info["shards"]) == 3 and len(data) == 9
    feed = batches(data, 3, seed=1)
    seen = []
    for _ in range(3):
        batch = next(feed)
        for row in (0, 2, 4):
            (one, chosen), (two, rejected) = read(batch, tokenizer, row), read(batch, tokenizer, row + 1)
            assert one == two and chosen.startswith(" Carp") and rejected.startswith(" Cow")
            seen.append(one)
    assert sorted(seen) == sorted(row["prompt"] for row in rows) != seen
    one = make(rows[:1]).tokens
    assert len(make(rows, max_tokens=2 * one + 1)) == 2 and len(make(rows, limit_documents=4)) == 4


def test_a_second_call_reuses(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = make([PAIR])
    monkeypatch.setattr(linearize.data.dataset, "pair_rows", lambda *args: pytest.fail("prepared again"))
    again = prepare(
        DataConfig(**first.info["config"]),
        AutoTokenizer.from_pretrained(demo.model_path()),
        cache_dir=tmp_path / "cache",
    )
    assert again.folder == first.folder


def test_errors(make: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.format=preference needs columns chosen and rejected, and it has text"):
        make([{"text": "fish"}])
    with pytest.raises(UserError, match=r"no column that fits.*pairs chosen and rejected are data.format=preference"):
        make([PAIR], format="auto")
    with pytest.raises(ValueError, match="recall_fraction: 0.5 has no meaning"):
        DataConfig(format="preference", recall_fraction=0.5)
    with pytest.raises(UserError, match=r"holds pairs of replies \(data.format=preference\), not texts"):
        linearize.data.tokens_of(DataConfig(source=str(tmp_path / "in.jsonl"), format="preference"), tokenizer)
    assert len(read_tokens("demo", tokenizer, "dev", max_tokens=10)) == 10


@pytest.fixture
def source(pico_model: Any, pico_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("linearize.data.dataset.HF_HOME", str(tmp_path / "hf"))
    write_source(tmp_path, pico_model(), pico_tokenizer)
    write_pairs(tmp_path / "pairs.jsonl")
    return tmp_path


TUNE = {"type": "finetune", "tokens": 256, "batch_size": 4, "lr": 1e-3, "train": ["*"]}


def prefer(source: Path, **settings: Any) -> dict[str, Any]:
    data = {"source": str(source / "pairs.jsonl"), "format": "preference"}
    return {"type": "dpo", "tokens": 512, "batch_size": 4, "lr": 1e-3, "train": ["*"], "data": data, **settings}


def test_stages_of_one_conversion_train_on_texts_and_on_pairs(source: Path) -> None:
    said: list[str] = []
    recipe = make_recipe(source, stages=[TUNE, prefer(source)])
    out = convert(recipe, source / "out", say=said.append)
    assert "pairs.jsonl" in said[0]
    lines = metrics(out / "run" / "1-dpo")
    assert len(lines) == 2 and lines[-1]["tokens"] == 512 and {"accuracy", "margin"} <= set(lines[0])
    again = linearize.Recipe.load(out / "recipe.yaml")
    assert again == recipe
    linearize.load(convert(again, source / "again", say=lambda text: None))
    assert metrics(source / "again" / "run" / "1-dpo")[-1]["loss"] == lines[-1]["loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {}}, r"stage dpo trains on pairs of replies, and its data.format is auto; .*format: preference"),
        ({"data": {"sorce": "x"}}, r"unknown key 'stages.1.data.sorce'; did you mean 'source'"),
        ({"data": {"seq_len": 16}}, r"stages.1.data.seq_len: a stage has a seq_len of its own; write stages.1.seq_len"),
        ({"data": {"format": "pairs"}}, r"stages.1.data.format: .*'preference'"),
        ({"type": "finetune"}, r"stage finetune trains on texts, and its data.format is preference"),
    ],
)
def test_wrong_data_end_a_conversion_before_weights_are_loaded(
    source: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(pipeline, "load", lambda *args, **options: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=message):
        plan_of(make_recipe(source, stages=[TUNE, prefer(source, **change)]))


def test_all_data_are_prepared_before_anything_trains(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.stages.base.train", lambda *args, **options: pytest.fail("trained"))
    (source / "pairs.jsonl").write_text(json.dumps({"text": "no pair"}) + "\n")
    with pytest.raises(UserError, match="has no pairs"):
        convert(make_recipe(source, stages=[TUNE, prefer(source)]), source / "out", say=lambda text: None)
