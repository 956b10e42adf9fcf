"""The benchmark: what it reports, out-of-memory rows, cache bytes and models with random weights."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from trainable import find_llama
from transformers import DynamicCache

from linearize import bench as module
from linearize.bench import bench, cache_bytes
from linearize.bench_models import random_model
from linearize.errors import UserError
from linearize.memory import out_of_memory, peak_bytes
from linearize.preflight import stages_of
from linearize.recipe import Recipe
from linearize.swap import swapped, teacher_path

CPU = torch.device("cpu")


def test_both_paths_are_timed_at_every_length(converted, tmp_path):
    model = converted("lolcats")
    report = bench(model, lengths=[32, 128], batch_size=2, decode_tokens=4, repeats=2)
    assert [(s.path, s.length) for s in report.speeds] == [
        (path, length) for length in (32, 128) for path in ("teacher", "student")
    ]
    assert all(s.prefill > 0 and s.decode > 0 and s.peak_bytes > 0 for s in report.speeds)
    teacher, student = ([report.at(path, n).cache_bytes for n in (32, 128)] for path in ("teacher", "student"))
    layers, kv_heads, dim, keys_and_values, float32, rows = 3, 2, 8, 2, 4, 2
    assert teacher == [layers * kv_heads * dim * keys_and_values * float32 * rows * (n + 4) for n in (32, 128)]
    assert student[0] == student[1], "the state's size must not depend on the context"
    assert not any(layer.teacher for layer in swapped(model).values())
    report.to_json(tmp_path / "new" / "bench.json")
    assert json.loads((tmp_path / "new" / "bench.json").read_text())["speeds"][0]["path"] == "teacher"
    table = report.table()
    assert table.count("student / teacher") == 2 and report.memory in table
    assert f"{student[1] / teacher[1]:.3g}x" in table


def test_cache_bytes_count_what_a_view_keeps_alive():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 100, 8), torch.zeros(1, 2, 100, 8), 0)
    cache.layers[0].keys = cache.layers[0].keys[:, :, -1:]
    assert cache_bytes(cache) == 2 * 100 * 8 * 4 * 2


def test_a_length_that_does_not_fit_is_a_row(converted, monkeypatch):
    model, real = converted("lolcats"), module._generate

    def generate(model, ids, decode_tokens):
        if ids.shape[1] > 32 and next(iter(swapped(model).values())).teacher:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, ids, decode_tokens)

    monkeypatch.setattr(module, "_generate", generate)
    report = bench(model, lengths=[32, 64], decode_tokens=2, repeats=1)
    assert report.at("teacher", 64).error == "out of memory"
    assert report.at("teacher", 32).error is None and report.at("student", 64).prefill > 0
    assert "out of memory" in report.table()


def test_other_errors_are_not_swallowed():
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory():
        raise RuntimeError("shapes do not match")
    with out_of_memory() as found:
        torch.empty(2**50, dtype=torch.float64)
    assert found
    with out_of_memory() as found:
        raise RuntimeError("Triton Error [CUDA]: out of memory")
    assert found


def test_a_model_without_mixers_is_refused(pico_model):
    with pytest.raises(UserError, match="no swapped layers"):
        bench(pico_model(), lengths=[8])


def test_peak_sees_memory_that_is_freed_again():
    def use():
        block = torch.ones(50 * 2**20 // 4)
        for _ in range(8):
            block.mul_(1.0)

    before = peak_bytes(lambda: None, CPU)
    assert peak_bytes(use, CPU) - before > 40 * 2**20


def test_training_steps_are_timed_beside_the_teachers(converted):
    model = converted("lolcats")
    stages = stages_of(Recipe.load("demo/lolcats", model="demo").stages, find_llama())
    seen = []
    report = bench(
        model,
        lengths=[16, 24],
        decode_tokens=2,
        repeats=1,
        stages=stages,
        train_length=32,
        measured=lambda report: seen.append((len(report.speeds), len(report.steps))),
    )
    assert seen == [(2, 0), (4, 0), (4, 1), (4, 2)], "every row is handed out as soon as it is there"
    transfer, finetune = report.steps
    assert (transfer.stage, finetune.stage) == ("attention_transfer", "finetune")
    assert transfer.teacher is None and finetune.teacher is not None
    assert (finetune.batch, finetune.length) == (1, 32) and finetune.peak_bytes is not None
    assert "| finetune " in report.table() and "1 x 32" in report.table()


def test_random_model_from_a_config_is_swapped_and_initialised(pico_config, tmp_path):
    pico_config().save_pretrained(tmp_path)
    mixer = {"type": "lolcats", "window": 8}
    model = random_model(str(tmp_path), mixer, dtype=torch.bfloat16)
    assert len(swapped(model)) == 3 and model.dtype == torch.bfloat16
    ids = torch.arange(40)[None]
    logits = model(input_ids=ids).logits
    assert logits.isfinite().all()
    assert torch.equal(logits, random_model(str(tmp_path), mixer, dtype=torch.bfloat16)(input_ids=ids).logits)
    with teacher_path(model):
        assert not torch.equal(model(input_ids=ids).logits, logits)


def test_a_checkpoints_recipe_runs_no_code():
    with pytest.raises(UserError, match="'antigravity:Stage' is code outside this toolkit"):
        stages_of([{"type": "antigravity:Stage"}], find_llama(), trusted=False)
    assert "antigravity" not in sys.modules


def test_unknown_shape_lists_the_known():
    with pytest.raises(UserError, match=r"unknown shape 'llama-3-8'; did you mean 'llama-3-8b'\?"):
        random_model("llama-3-8", "lolcats")
