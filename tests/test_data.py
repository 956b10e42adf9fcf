"""Preparing data: packing, labels, sources, the cache, and what users read when something is wrong."""

import gzip
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

import linearize.data
from linearize import demo
from linearize.data import DataConfig, PackedDataset, batches, model_inputs, prepare, read_tokens, tokens_of
from linearize.errors import UserError

EOS = 0
TEXTS = ["One fish.", "Two fish and a longer tail of words.", "", "Red fish, blue fish, old fish, new fish."]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.model_path())


@pytest.fixture
def make(tmp_path, tokenizer):
    """Factory (rows, **config) -> PackedDataset of a file with these rows, in order, 8 tokens a sequence."""

    def build(rows, **overrides):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare(config(tmp_path, **overrides), tokenizer, cache_dir=tmp_path / "cache")

    return build


def config(tmp_path, **overrides):
    values = {"source": str(tmp_path / "in.jsonl"), "seq_len": 8, "shuffle": False}
    return DataConfig(**(values | overrides))


def texts(*values):
    return [{"text": value} for value in values]


def everything(data):
    return data.batch(range(len(data)))


def test_packing_lays_documents_end_to_end(make, tokenizer):
    data = make(texts(*TEXTS))
    stream = [i for text in TEXTS if text for i in [*tokenizer(text)["input_ids"], EOS]]
    batch = everything(data)
    assert data.info["documents"] == 3 and data.tokens == 8 * len(data) and len(data) == len(stream) // 8 > 2
    assert batch["input_ids"].flatten().tolist() == stream[: data.tokens]
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert all(value.dtype == torch.int64 and value.shape == (len(data), 8) for value in batch.values())
    before = [EOS, *stream]
    for row in range(len(data)):
        for t in range(8):
            index = 8 * row + t
            starts = t == 0 or before[index] == EOS
            assert batch["position_ids"][row, t] == (0 if starts else batch["position_ids"][row, t - 1] + 1)
            assert batch["labels"][row, t] == (-100 if starts else stream[index])
    assert (batch["position_ids"][:, 1:] == 0).any()


def test_without_end_marks_boundaries_stay(make, tokenizer):
    batch = everything(make(texts("One fish.", "Two fish and more."), eos_between_documents=False))
    first = len(tokenizer("One fish.")["input_ids"])
    assert EOS not in batch["input_ids"]
    assert batch["position_ids"][0, first] == 0 and batch["labels"][0, first] == -100


def test_one_document_a_row_pads_right_and_cuts(make, tokenizer):
    batch = everything(make(texts("One fish.", TEXTS[3]), packing=False))
    n = len(tokenizer("One fish.")["input_ids"]) + 1
    assert batch["attention_mask"].tolist() == [[1] * n + [0] * (8 - n), [1] * 8]
    assert (batch["input_ids"][0, n:] == tokenizer.pad_token_id).all() and (batch["labels"][0, n:] == -100).all()
    assert batch["input_ids"][1].tolist() == tokenizer(TEXTS[3])["input_ids"][:8]
    assert batch["position_ids"].tolist() == [list(range(8))] * 2


def trained_text(batch, tokenizer, row=0):
    labels = batch["labels"][row]
    return tokenizer.decode(labels[labels != -100])


def test_instruction_trains_on_the_output_only(make, tokenizer):
    rows = [
        {"instruction": "Name a fish.", "input": "", "output": "Carp."},
        {"instruction": "Name a fish.", "input": "Big.", "output": "Tuna."},
    ]
    batch = everything(make(rows, seq_len=96, packing=False, completion_only=True))
    read = [
        tokenizer.decode(ids[mask == 1]) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert read[0].endswith(
        "completes the request.\n\n### Instruction:\nName a fish.\n\n### Response:\nCarp.<|endoftext|>"
    )
    assert read[1].endswith("\nName a fish.\n\n### Input:\nBig.\n\n### Response:\nTuna.<|endoftext|>")
    assert trained_text(batch, tokenizer) == "Carp.<|endoftext|>"
    assert trained_text(batch, tokenizer, 1) == "Tuna.<|endoftext|>"


def test_chat_without_template_and_sharegpt_names(make, tokenizer):
    turns = [("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "So long")]
    rows = [{"conversations": [{"from": who, "value": what} for who, what in turns]}]
    batch = everything(make(rows, seq_len=64, packing=False, completion_only=True))
    read = tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0] == 1])
    assert read == "user: Hi\nassistant: Hello\nuser: Bye\nassistant: So long\n<|endoftext|>"
    assert trained_text(batch, tokenizer) == " Hello\n So long\n<|endoftext|>"


def chat_tokenizer(template):
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    tokenizer.chat_template = template
    return tokenizer


MESSAGES = [{"messages": [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Yo")) * 2]}]


def test_chat_with_template(make, tmp_path):
    make(texts("unused " * 20))
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (tmp_path / "in.jsonl").write_text(json.dumps(MESSAGES[0]))
    tokenizer = chat_tokenizer(template)
    chosen = config(tmp_path, seq_len=64, packing=False, completion_only=True)
    batch = everything(prepare(chosen, tokenizer, cache_dir=tmp_path / "cache"))
    read = tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0] == 1])
    assert read == "[user]Hi[/][assistant]Yo[/][user]Hi[/][assistant]Yo[/]<|endoftext|>"
    assert trained_text(batch, tokenizer) == "Yo[/]Yo[/]<|endoftext|>"


def test_template_that_rewrites_turns_is_refused_for_completions(tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps(MESSAGES[0]))
    tokenizer = chat_tokenizer("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match=r"rewrites earlier turns.*completion_only=false"):
        prepare(config(tmp_path, completion_only=True), tokenizer, cache_dir=tmp_path / "cache")


def test_limits_and_shards(make, monkeypatch):
    monkeypatch.setattr(linearize.data.dataset, "_SHARD_TOKENS", 16)
    rows = texts(*(f"Document number {i} of many fish." for i in range(12)))
    data = make(rows)
    assert len(data.info["shards"]) > 2
    whole = everything(data)
    picked = data.batch([len(data) - 1, 0, 2])
    assert torch.equal(picked["input_ids"], whole["input_ids"][[len(data) - 1, 0, 2]])
    with pytest.raises(IndexError):
        data.batch([len(data)])
    assert make(rows, max_tokens=30).tokens == 24
    assert make(rows, max_tokens=3).tokens == 8
    assert make(rows, limit_documents=2).info["documents"] == 2


def test_shuffle_depends_on_the_seed_alone(make):
    rows = texts(*(f"Document number {i} of many fish." for i in range(12)))
    first, again, other = (everything(make(rows, shuffle=True, seed=s))["input_ids"] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_batches_are_a_function_of_the_step(make):
    data = make(texts(*(f"Document number {i} of many fish." for i in range(12))), shuffle=True)
    steps = [b["input_ids"] for b in islice(batches(data, 2, seed=5), 3 * len(data))]
    resumed = next(batches(data, 2, seed=5, start_step=7))["input_ids"]
    assert torch.equal(resumed, steps[7])
    epoch = torch.cat(steps)[: len(data)]
    assert torch.equal(epoch, data.batch(data.order(5, 0))["input_ids"])
    assert sorted(data.order(5, 0).tolist()) == list(range(len(data)))
    assert data.order(5, 0).tolist() != data.order(5, 1).tolist() != data.order(6, 1).tolist()
    ranks = [next(batches(data, 1, seed=5, start_step=3, rank=r, world=2))["input_ids"] for r in (0, 1)]
    assert torch.equal(torch.cat(ranks), steps[3])


def test_no_shuffle_keeps_the_order(make):
    data = make(texts(*TEXTS))
    assert data.order(3, 4).tolist() == list(range(len(data)))


def test_recall_documents_are_their_share_of_rows(make, tokenizer):
    rows = texts(*("The fish swam down the stream and up again. " * 30 for _ in range(10)))
    data = make(rows, seq_len=128, recall_fraction=0.25)
    recall = ["What is the special number for" in tokenizer.decode(ids) for ids in everything(data)["input_ids"]]
    assert sum(recall) == len(data) // 4 > 3
    batch = data.batch([recall.index(True), recall.index(False)])
    assert (batch["labels"][0, 1:] != -100).all()
    facts = tokenizer.decode(batch["input_ids"][0]).count("?")
    assert tokenizer.decode(batch["input_ids"][batch["answers"]]).count(".") == facts > 0
    assert not batch["answers"][1].any() and "answers" not in data.batch([recall.index(False)])
    assert model_inputs(batch).keys() == {"input_ids", "position_ids"}


def test_second_call_reuses_and_changes_are_seen(make, tokenizer, tmp_path, monkeypatch):
    first = make(texts(*TEXTS))
    calls = []
    original = linearize.data.dataset.tokenized
    monkeypatch.setattr(linearize.data.dataset, "tokenized", lambda *a: calls.append(1) or original(*a))
    tokenizer(["a", "b b b b"], padding=True, truncation=True, max_length=3)  # leaves settings in the tokenizer
    again = prepare(config(tmp_path), tokenizer, cache_dir=tmp_path / "cache")
    assert again.folder == first.folder and not calls
    changed = AutoTokenizer.from_pretrained(demo.model_path())
    changed.add_tokens(["fish"])
    other = prepare(config(tmp_path), changed, cache_dir=tmp_path / "cache")
    assert other.folder != first.folder and len(calls) == 1
    longer = make(texts(*TEXTS, "More fish than ever were in this small stream."))
    assert len(longer) > len(first) and len(calls) == 2


def test_interrupted_preparation_leaves_nothing(make, tmp_path, monkeypatch):
    monkeypatch.setattr(linearize.data.dataset, "_SHARD_TOKENS", 16)
    save = linearize.data.dataset._save

    def interrupted(rows, folder, number):
        if number == 1:
            raise KeyboardInterrupt
        return save(rows, folder, number)

    monkeypatch.setattr(linearize.data.dataset, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(texts(*TEXTS))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir() and p.name != "sources"]
    monkeypatch.setattr(linearize.data.dataset, "_save", save)
    assert len(make(texts(*TEXTS))) > 2


def test_what_a_killed_process_left_is_not_read(make, tokenizer, tmp_path):
    good = make(texts(*TEXTS))
    expected = everything(good)["input_ids"]
    (good.folder / good.info["shards"][0]).write_bytes(b"half")
    os.rename(good.folder, good.folder.with_name(f"{good.folder.name}.partial"))
    remade = prepare(config(tmp_path), tokenizer, cache_dir=tmp_path / "cache")
    assert remade.folder == good.folder
    assert torch.equal(everything(remade)["input_ids"], expected)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_damaged_data_names_the_folder(make):
    data = make(texts(*TEXTS))
    (data.folder / data.info["shards"][0]).write_bytes(b"half")
    with pytest.raises(UserError, match=f"{data.folder}.* is damaged .*delete that folder"):
        PackedDataset(data.folder)


def test_full_disk_is_a_user_error(make, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(linearize.data.dataset, "save_file", full)
    with pytest.raises(UserError, match="no space left while writing to .*finished data sets"):
        make(texts(*TEXTS))
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.parametrize(
    ("name", "content"), [("in.txt", "Fish. " * 20), ("in.json", json.dumps(texts("Fish. " * 20)))]
)
def test_other_files(tmp_path, tokenizer, name, content):
    (tmp_path / name).write_text(content)
    data = prepare(config(tmp_path, source=str(tmp_path / name)), tokenizer, cache_dir=tmp_path / "cache")
    assert data.info["documents"] == 1
    assert "Fish. Fish" in tokenizer.decode(data.batch([0])["input_ids"][0])


def test_folder_and_pattern_choose_files_by_split(tmp_path, tokenizer):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a-train", "b-train", "c-dev"):
        (folder / f"{name}.txt").write_text(f"{name} fish in the stream")
    for source in (str(folder), str(folder / "*.txt")):
        assert tokenizer.decode(read_tokens(source, tokenizer, "dev")) == "c-dev fish in the stream<|endoftext|>"
        train = tokenizer.decode(read_tokens(source, tokenizer))
        assert "a-train" in train and "b-train" in train and "dev" not in train
        with pytest.raises(UserError, match="data.split='test' is not in .*known: train, validation"):
            read_tokens(source, tokenizer, "test")


def test_demo_source_and_slices(tokenizer):
    ids = read_tokens("demo", tokenizer, "dev", max_tokens=3000)
    assert ids.shape == (3000,) and ids.dtype == torch.int64
    assert torch.equal(read_tokens("demo", tokenizer, "dev[:1]", max_tokens=3000), ids)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_dataset(monkeypatch, tmp_path, tokenizer, streaming):
    def load_dataset(source, name, *, split, revision, streaming):
        assert (source, name, split, revision) == ("someone/fish", "big", "train", "abc")
        rows = datasets.Dataset.from_list(texts(*TEXTS * 3))
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    chosen = DataConfig(
        source="someone/fish", name="big", revision="abc", streaming=streaming, seq_len=8, limit_documents=7
    )
    assert 5 <= prepare(chosen, tokenizer, cache_dir=tmp_path).info["documents"] <= 7


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        (
            [{"body": "x", "n": 1}],
            {},
            r"no column that fits data.format=auto; its columns are body, n.*data.text_column=",
        ),
        (
            [{"body": "x"}],
            {"text_column": "boby"},
            r"data.text_column='boby' is not a column; did you mean 'body'",
        ),
        (texts("x"), {"format": "chat"}, "no column that fits data.format=chat; its columns are text"),
        (texts("", " "), {}, "all documents are empty"),
        ([*texts("One fish."), {"text": 3}], {}, "in.jsonl, line 2: text is no text, but 3"),
        ([], {}, "in.jsonl is empty"),
        (
            texts("One fish."),
            {"seq_len": 512},
            r"has 5 tokens in 1 documents, fewer than one sequence of data.seq_len=512",
        ),
        (texts("One fish."), {"completion_only": True}, "completion_only=true needs chat or instruction"),
        (texts("One fish."), {"split": "validation"}, r"data.split='validation' is not in .*known: train"),
    ],
)
def test_errors_of_content(make, rows, overrides, message):
    with pytest.raises(UserError, match=message):
        make(rows, **overrides)


def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer):
    for name, start in (("plain", ""), ("marked", "\ufeff")):
        (tmp_path / f"{name}.txt").write_text(f"{start}One fish.", encoding="utf-8")
    plain, marked = (tokens_of(DataConfig(source=str(tmp_path / f"{n}.txt")), tokenizer) for n in ("plain", "marked"))
    assert plain.tolist() == marked.tolist()


def test_errors_of_place(tmp_path, tokenizer):
    def attempt(**values):
        prepare(DataConfig(**values), tokenizer, cache_dir=tmp_path / "cache")

    with pytest.raises(UserError, match=r"data.source='texts/none.parquet' does not exist \(looked in /"):
        attempt(source="texts/none.parquet")
    with pytest.raises(UserError, match="someone/no-such-data.* Hub: .*HF_HUB_OFFLINE.*data.source=path/to"):
        attempt(source="someone/no-such-data")
    with pytest.raises(UserError, match="unknown split 'evaluation'.*known: dev, test, train, validation"):
        attempt(split="evaluation")
    with pytest.raises(UserError, match="can be no path: File name too long"):
        attempt(source="n" * 300)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text("{broken")
    with pytest.raises(UserError, match=r"files of one kind; found .jsonl, .txt, known: .parquet"):
        attempt(source=str(tmp_path))
    with pytest.raises(UserError, match=r"cannot read data.source=.*b.jsonl.*JSON"):
        attempt(source=str(tmp_path / "b.jsonl"))


def test_every_setting_is_described_and_unknown_ones_are_refused():
    properties = DataConfig.model_json_schema()["properties"]
    assert all(field.get("description") for field in properties.values())
    with pytest.raises(ValueError, match="sequence_length"):
        DataConfig(sequence_length=3)


def test_two_at_once_prepare_once(tmp_path, tokenizer, monkeypatch):
    calls = []
    original = linearize.data.dataset.tokenized

    def slow(*arguments):
        calls.append(arguments)
        time.sleep(0.3)
        return original(*arguments)

    monkeypatch.setattr(linearize.data.dataset, "tokenized", slow)
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "Fish. " * 20}))
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(prepare, config(tmp_path), tokenizer, cache_dir=tmp_path / "cache") for _ in "ab"]
        first, second = (run.result() for run in runs)
    assert first.folder == second.folder and len(calls) == 1


def test_default_cache_is_in_the_hugging_face_home(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(linearize.data.dataset, "HF_HOME", str(tmp_path / "home"))
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "Fish. " * 20}))
    assert prepare(config(tmp_path), tokenizer).folder.parent == tmp_path / "home" / "linearize"


def test_rows_without_content_are_skipped(make):
    chat = [{"role": "user", "content": "One fish."}, {"role": "assistant", "content": "Two fish and a longer tail."}]
    rows = [{"messages": chat}, {"messages": None}, {"messages": []}] * 2
    assert make(rows).info["documents"] == 2
    pair = {"instruction": "Name a fish.", "output": "Red fish, blue fish, old fish."}
    rows = [pair, {**pair, "output": None}, {**pair, "instruction": None}] * 2
    assert make(rows).info["documents"] == 2


@pytest.mark.parametrize("message", [{"speaker": "user", "text": "One fish."}, "One fish."])
def test_a_message_without_a_role_is_shown(make, message):
    with pytest.raises(UserError, match="a chat message without a role: .*One fish.*data.text_column"):
        make([{"messages": [message]}])


SAID = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
SAID += "{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.mark.parametrize("template", [None, SAID], ids=["none", "template"])
@pytest.mark.parametrize(
    ("roles", "reply"),
    [(("assistant", "user", "assistant"), "Carp2"), (("user", "assistant", "user"), "Carp1")],
)
def test_replies_train_wherever_they_stand(tmp_path, template, roles, reply):
    tokenizer = chat_tokenizer(template)
    messages = [{"role": role, "content": f"Carp{i}"} for i, role in enumerate(roles)]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": messages}))
    chosen = config(tmp_path, seq_len=96, packing=False, completion_only=True)
    batch = everything(prepare(chosen, tokenizer, cache_dir=tmp_path / "cache"))
    said = trained_text(batch, tokenizer)
    assert [part for part in ("Carp0", "Carp1", "Carp2") if part in said] == [reply]
    ended = roles[-1] == "assistant"
    assert said.endswith("<|endoftext|>") == ended, "only a reply is ended"


def test_a_row_that_the_template_refuses_is_named(tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": MESSAGES[0]["messages"][:1] * 2}))
    tokenizer = chat_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="refuses a conversation .*must alternate.*roles user, user, beginning 'Hi'"):
        prepare(config(tmp_path), tokenizer, cache_dir=tmp_path / "cache")


REPLY = {"role": "assistant", "content": "Two fish."}
PAIR = {"prompt": "Name a fish.", "chosen": " Carp", "rejected": " Cow"}
PAIRS = {"format": "preference"}


@pytest.mark.parametrize(
    ("good", "bad", "overrides", "message"),
    [
        ({"text": "One fish."}, {"text": ["fish"]}, {}, r"text is no text, but \['fish'\]"),
        ({"text": "One fish."}, b'{"text": "a \xff"}', {}, "0xff, its byte 13, is no UTF-8"),
        ({"text": "One fish."}, b'{"text": "a', {}, "Unterminated string"),
        ({"text": "One fish."}, b'{"text": "\\ud800"}', {}, "surrogates not allowed"),
        ({"text": "One fish."}, b"5", {}, "no object, but 5"),
        (MESSAGES[0], {"messages": "fish"}, {}, "messages is no list of messages, but 'fish'"),
        (MESSAGES[0], {"messages": [{"content": "fish"}]}, {}, "a chat message without a role"),
        (MESSAGES[0], {"messages": [{"role": "user", "content": 5}, REPLY]}, {}, "content is no text, but 5"),
        (MESSAGES[0], {"messages": [{"role": 5, "content": "fish"}, REPLY]}, {}, "message without a role"),
        ({"instruction": "a", "output": "b"}, {"instruction": 5, "output": "b"}, {}, "instruction is no text, but 5"),
        (
            {"instruction": "a", "input": "", "output": "b"},
            {"instruction": "a", "input": ["c"], "output": "b"},
            {},
            r"input is no text, but \['c'\]",
        ),
        (PAIR, {**PAIR, "chosen": 5}, PAIRS, "chosen is neither a text nor a list of messages, but 5"),
        (PAIR, {**PAIR, "prompt": 5}, PAIRS, "prompt is no text, but 5"),
        (PAIR, {**PAIR, "rejected": [REPLY]}, PAIRS, "one is a text, and the other a list"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
def test_a_row_that_cannot_be_used_is_found(tmp_path, tokenizer, good, bad, overrides, message, compressed):
    rows = [*[json.dumps(good).encode()] * 200, bad if isinstance(bad, bytes) else json.dumps(bad).encode()]
    content = b"\n".join([*rows, rows[0]])
    (tmp_path / "in.jsonl").write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(UserError, match=f"in.jsonl, line 201: .*{message}"):
        prepare(config(tmp_path, **overrides), tokenizer, cache_dir=tmp_path / "cache")


def test_places_in_other_files(tmp_path, tokenizer):
    def told(name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            tokens_of(DataConfig(source=str(tmp_path / name)), tokenizer)
        return str(caught.value)

    assert "a.json, element 3: text is no text, but 5" in told("a.json", json.dumps(["a", "b", 5]).encode())
    assert "a.txt, line 2: 0xe9, its byte 4, is no UTF-8" in told("a.txt", "One.\nTwo\u00e9".encode("latin-1"))
    chats = [[{"role": "user", "content": "a"}], [{"role": None, "content": "b"}]]
    pq.write_table(pa.table({"messages": chats}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="b.parquet, row 2: a chat message without a role"):
        tokens_of(DataConfig(source=str(tmp_path / "b.parquet")), tokenizer)


def test_a_slice_without_rows_is_named(make):
    with pytest.raises(UserError, match=r"data.split='train\[:0\]'"):
        make(texts("One fish."), split="train[:0]")


def test_contents_in_parts_are_joined(tmp_path, tokenizer):
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "fish."}]
    found = []
    for name, content in (("parts", parts), ("whole", "One fish.")):
        row = {"messages": [{"role": "user", "content": content}, REPLY]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        found.append(tokens_of(DataConfig(source=str(tmp_path / f"{name}.jsonl")), tokenizer).tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        ([{"messages": [REPLY]}] * 9, {"completion_only": True}, "nothing to predict.*no row has a reply.*only=false"),
        (texts(*"abc"), {"packing": False, "eos_between_documents": False}, "nothing to predict.*single tokens"),
    ],
)
def test_data_without_anything_to_predict_are_refused(make, rows, overrides, message):
    with pytest.raises(UserError, match=message):
        make(rows, **overrides)
