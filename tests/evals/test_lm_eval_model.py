"""Every way from a checkpoint to the harness gives the same numbers, in batches of any size, and with little memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evals.harness_cases import ALL, OPTIONS, WRITING, write_questions, write_rows

from linearize.errors import UserError
from linearize.evals import lm_eval_model
from linearize.evals.lm_eval_model import LinearizeLM, in_memory
from linearize.evals.local_tasks import write_tasks
from linearize.hf.export import export

RUNNER = Path(__file__).with_name("run_lm_eval.py")


@pytest.fixture
def student(converted: Any) -> Any:
    """A hybrid with a context shorter than some of the texts."""
    return converted("lolcats", "LSL", max_position_embeddings=64)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Task files for every kind of request."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip for all packages: seconds
    write_tasks(write_questions(tmp_path / "questions"), tmp_path / "tasks")
    write_rows(tmp_path / "writing.jsonl", OPTIONS)
    (tmp_path / "tasks" / "writing.yaml").write_text(WRITING.format(data=tmp_path / "writing.jsonl"))
    return tmp_path / "tasks"


def run(model: Any, tasks: Path, **options: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model, tasks=ALL, task_manager=manager, bootstrap_iters=0, log_samples=True, **options)
    answers = {task: [s["filtered_resps"] for s in kept] for task, kept in found["samples"].items()}
    return json.loads(json.dumps({"results": found["results"], "answers": answers}, default=str))


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same metrics, and the same log-likelihoods and texts behind them."""
    assert one["answers"].keys() == other["answers"].keys() >= {*ALL} - {"pairs"}
    for task, answers in one["answers"].items():
        for mine, yours in zip(answers, other["answers"][task], strict=True):
            for a, b in zip(flat(mine), flat(yours), strict=True):
                assert a == (pytest.approx(b, abs=2e-4) if isinstance(b, float) else b), task
    for task, metrics in one["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and math.isfinite(value) and "," in name:
                assert value == pytest.approx(other["results"][task][name], rel=1e-3), (task, name)


def flat(values: Any) -> list[Any]:
    return [x for value in values for x in flat(value)] if isinstance(values, list) else [values]


def test_the_comparison_can_fail(student: Any, pico_tokenizer: Any, tasks: Path, pico_model: Any) -> None:
    found = run(in_memory(student, pico_tokenizer, 4), tasks)
    assert len(set(flat(found["answers"]["writing"]))) > 1
    other = run(in_memory(pico_model(max_position_embeddings=64), pico_tokenizer, 4), tasks)
    with pytest.raises(AssertionError):
        assert_same(found, other)


def test_every_way_gives_the_same(student: Any, pico_tokenizer: Any, tasks: Path, tmp_path: Path) -> None:
    """In memory, by the model type `linearize`, and by the harness alone, which cannot import the toolkit."""
    folder = export(student, pico_tokenizer, tmp_path / "student")
    ours = run(in_memory(student, pico_tokenizer, 1), tasks)
    assert_same(ours, run("linearize", tasks, model_args=f"pretrained={folder}", batch_size=8, device="cpu"))
    hf = {"model": "hf", "model_args": f"pretrained={folder},trust_remote_code=True", "tasks": ALL, "device": "cpu"}
    runs = {"one": {**hf, "batch_size": 1}, "eight": {**hf, "batch_size": 8}}
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, RUNNER, tasks, tmp_path / "out.json"]
    done = subprocess.run(command, input=json.dumps(runs), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert_same(ours, found["one"])
    assert_same(ours, found["eight"])


@pytest.mark.parametrize(("key", "layers"), [("gdn", "LLL"), ("mamba2", "LSL")])
def test_a_batch_changes_nothing(converted: Any, pico_tokenizer: Any, tasks: Path, key: str, layers: str) -> None:
    model = converted(key, layers, max_position_embeddings=64)
    alone = run(in_memory(model, pico_tokenizer, 1), tasks)
    assert_same(alone, run(in_memory(model, pico_tokenizer, 8), tasks))
    assert_same(alone, run(in_memory(model, pico_tokenizer, "auto"), tasks))


def watch(model: Any) -> list[tuple[int, int]]:
    """Shapes of the token ids of every forward from now on."""
    shapes: list[tuple[int, int]] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    return shapes


def test_automatic_batches_hold_as_many_tokens_whatever_the_length(
    student: Any, pico_tokenizer: Any, tasks: Path
) -> None:
    lm = in_memory(student, pico_tokenizer, "auto")
    lm.tokens = 128
    shapes = watch(student)
    run(lm, tasks)
    scored = [(rows, length) for rows, length in shapes if length > 1]  # one token at a time is decoding
    assert max(rows * length for rows, length in scored) <= 128
    assert max(rows for rows, length in scored) > 128 // max(length for _, length in scored)
    assert max(rows for rows, _ in watch_fixed(student, pico_tokenizer, tasks)) == 3


def watch_fixed(model: Any, tokenizer: Any, tasks: Path) -> list[tuple[int, int]]:
    shapes = watch(model)
    run(in_memory(model, tokenizer, 3), tasks)
    return shapes


def test_automatic_batches_shrink_until_they_fit(
    student: Any, pico_tokenizer: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(in_memory(student, pico_tokenizer, 1), tasks)
    lm = in_memory(student, pico_tokenizer, "auto")
    failures = run_out_of_memory(student, beyond=100)
    assert lm.tokens == 2048
    assert_same(whole, run(lm, tasks))
    assert 50 < lm.tokens <= 128 and 1 <= failures.count <= 8


def run_out_of_memory(model: Any, beyond: int) -> Any:
    """From now on a forward of more tokens than that fails as CUDA does."""
    failures = SimpleNamespace(count=0)

    def check(module: Any, args: Any) -> None:
        if args[0].numel() > beyond:
            failures.count += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.model.embed_tokens.register_forward_pre_hook(check)
    return failures


def test_a_tokenizer_without_marks_is_an_error(student: Any, pico_tokenizer: Any) -> None:
    for name in ("bos_token", "eos_token"):
        setattr(pico_tokenizer, name, None)
    with pytest.raises(UserError, match="has neither bos_token nor eos_token"):
        in_memory(student, pico_tokenizer, 1)


def test_memory_that_holds_not_even_one_row_is_an_error(student: Any, pico_tokenizer: Any, tasks: Path) -> None:
    run_out_of_memory(student, beyond=5)
    with pytest.raises(UserError, match=r"one row of \d+ tokens does not fit into .* memory of cpu; load"):
        run(in_memory(student, pico_tokenizer, "auto"), tasks)
    with pytest.raises(UserError, match=r"3 rows of a task do not fit .* choose a smaller batch_size, or auto"):
        run(in_memory(student, pico_tokenizer, 3), tasks)


def test_a_batch_that_does_not_fit_is_halved_from_the_rows_that_there_are(
    student: Any, pico_tokenizer: Any, tasks: Path
) -> None:
    lm = in_memory(student, pico_tokenizer, "auto")
    lm.tokens = 2**20
    failures = run_out_of_memory(student, beyond=100)
    run(lm, tasks)
    assert lm.tokens <= 128 and failures.count <= 8, "two million tokens halved to 128 would be 13 failures"


def test_an_error_that_is_not_about_memory_is_not_tried_again(student: Any, pico_tokenizer: Any, tasks: Path) -> None:
    tried = []

    def fail(module: Any, args: Any) -> None:
        tried.append(1)
        raise RuntimeError("shapes do not fit")

    student.model.embed_tokens.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(in_memory(student, pico_tokenizer, "auto"), tasks)
    assert len(tried) == 1


def test_most_tokens_depend_on_memory_and_vocabulary(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(available=2 * 97 * 4 * 3 * 50)
    monkeypatch.setattr(lm_eval_model.psutil, "virtual_memory", lambda: memory)
    assert lm_eval_model._most_tokens(student) == 50
    memory.available = 2**60
    assert lm_eval_model._most_tokens(student) == lm_eval_model.MOST_TOKENS["cpu"]


def test_both_ways_agree_on_length_padding_and_type(student: Any, pico_tokenizer: Any, tmp_path: Path) -> None:
    folder = export(student, pico_tokenizer, tmp_path / "student")
    from lm_eval.models.huggingface import HFLM

    ours, theirs = LinearizeLM(str(folder), device="cpu"), HFLM(str(folder), device="cpu", trust_remote_code=True)
    for name in ("max_length", "prefix_token_id", "eot_token_id", "add_bos_token", "max_gen_toks", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.max_length == 64 and ours.model.dtype == theirs.model.dtype
    assert ours.tok_encode("a b") == theirs.tok_encode("a b")


def test_log_probabilities_of_bfloat16_weights_are_float32(student: Any, pico_tokenizer: Any, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = str(export(student.bfloat16(), pico_tokenizer, tmp_path / "student"))
    asked = [Instance("loglikelihood", {}, ("a b", f" {text}"), i) for i, text in enumerate(["c d", "d c e", "b"])]
    ours, theirs = LinearizeLM(folder, device="cpu"), HFLM(folder, device="cpu", softmax_dtype="float32")
    found = [value for value, _ in ours.loglikelihood(asked, disable_tqdm=True)]
    assert ours.model.dtype == torch.bfloat16
    assert found == [value for value, _ in theirs.loglikelihood(asked, disable_tqdm=True)]
    assert found != torch.tensor(found).bfloat16().tolist()


def test_options_that_load_otherwise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not take peft; use --model hf with trust_remote_code=True"):
        LinearizeLM(str(tmp_path), peft="adapter")
    with pytest.raises(UserError, match=r"unknown model 'lama-3-8b'; did you mean 'llama-3-8b'"):
        LinearizeLM("lama-3-8b")


@pytest.mark.filterwarnings("ignore:'linearize.evals.lm_eval_model' found in sys.modules")
def test_the_command_line_knows_the_model_type(
    student: Any, pico_tokenizer: Any, tasks: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `python -m linearize.evals.lm_eval_model`, but without the harness's index, which takes 12 s to read."""
    import runpy
    from functools import partial

    import lm_eval.tasks

    folder = export(student, pico_tokenizer, tmp_path / "student")
    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    monkeypatch.delitem(lm_eval.api.registry.model_registry._objs, "linearize", raising=True)
    arguments = ["lm_eval", "--model", "linearize", "--model_args", f"pretrained={folder}", "--tasks", "options"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--include_path", str(tasks), "--device", "cpu"])
    runpy.run_module("linearize.evals.lm_eval_model", run_name="__main__")
    expected = run(in_memory(student, pico_tokenizer, 1), tasks)["results"]["options"]["acc,none"]
    assert f"{expected:.4f}" in capsys.readouterr().out
