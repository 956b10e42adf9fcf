"""Real processes on real conversions: SIGKILL in the middle of either stage, and two processes under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from trainable import make_recipe, metrics, write_source

from linearize.pipeline import convert

CLI = ["-m", "linearize.cli.main", "convert"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def write_recipe(folder: Path, **sections: Any) -> Any:
    recipe = make_recipe(folder, **sections)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return recipe


def kill_at(step: int, stage: Path, command: list[str], folder: Path) -> None:
    """Run a command and SIGKILL it as soon as `stage` has logged `step`."""
    with open(folder / "log.txt", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(folder))
        while process.poll() is None and not _logged(stage, step):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (folder / "log.txt").read_text()
    assert not (stage / "result.safetensors").exists(), "the stage had ended before the signal came"


def run_group(command: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and output of a command; after two minutes it and the processes it started are killed."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment(folder), start_new_session=True, **options)
    try:
        printed = process.communicate(timeout=120)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, printed


def _logged(stage: Path, step: int) -> bool:
    path = stage / "metrics.jsonl"
    return path.exists() and len(path.read_text().splitlines()) > step


def test_a_conversion_killed_in_either_stage_resumes_to_the_same_bits(
    pico_model: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("linearize.data.dataset.HF_HOME", str(tmp_path / "hf"))
    write_source(tmp_path, pico_model(), pico_tokenizer)
    common = {"tokens": 120 * 4 * 32, "batch_size": 4, "checkpoint_every": 7}
    lora = {"r": 2, "dropout": 0.1}
    stages = [
        {"type": "attention_transfer", "schedule": "plateau", "plateau_window": 5, "plateau_patience": 0, **common},
        {"type": "finetune", "lora": lora, "train": ["*.mixer.*"], "lr": 1e-2, **common},
    ]
    recipe = write_recipe(tmp_path, stages=stages)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    convert(recipe, straight, say=lambda text: None)
    command = [sys.executable, *CLI, "--recipe", str(tmp_path / "recipe.yaml"), "-o", str(killed)]
    kill_at(20, killed / "run" / "0-attention_transfer", command, tmp_path)
    kill_at(30, killed / "run" / "1-finetune", [*command, "--resume"], tmp_path)
    assert (killed / "run" / "0-attention_transfer" / "result.safetensors").exists()
    assert not (killed / "config.json").exists()
    convert(recipe, killed, resume=True, say=lambda text: None)
    for name in ("0-attention_transfer", "1-finetune"):
        one, two = metrics(straight / "run" / name), metrics(killed / "run" / name)
        assert [line["step"] for line in two] == list(range(120))
        assert [line["loss"] for line in one] == [line["loss"] for line in two]
    one, two = (load_file(out / "model.safetensors") for out in (straight, killed))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_give_the_weights_of_one(
    pico_model: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("linearize.data.dataset.HF_HOME", str(tmp_path / "hf"))
    write_source(tmp_path, pico_model(), pico_tokenizer)
    common = {"tokens": 4 * 4 * 32, "batch_size": 4}
    stages = [
        {"type": "attention_transfer", **common},
        {"type": "finetune", "train": ["*"], "lr": 1e-3, "micro_batch_size": 1, "window_dropout": [0.5], **common},
    ]
    evaluation = {"windows": 2, "recall": False, "batch_size": 2, "split": "train"}
    data = {"source": str(tmp_path / "train.jsonl"), "seq_len": 32, "packing": False}  # rows of unequal length
    recipe = write_recipe(tmp_path, stages=stages, evaluation=evaluation, data=data)
    one, two = tmp_path / "one", tmp_path / "two"
    convert(recipe, one, say=lambda text: None)
    command = [*TWO, *CLI, "--recipe", str(tmp_path / "recipe.yaml"), "-o", str(two)]
    status, printed = run_group(command, tmp_path)
    assert status == 0, printed
    assert printed.count(f"checkpoint written to {two}") == 1
    expected, found = (load_file(out / "model.safetensors") for out in (one, two))
    source = load_file(tmp_path / "source" / "model.safetensors")
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert all(not torch.equal(found[name], source[name]) for name in source)
    for name in ("0-attention_transfer", "1-finetune"):
        a, b = metrics(one / "run" / name), metrics(two / "run" / name)
        assert [line["step"] for line in b] == list(range(4))
        torch.testing.assert_close([x["loss"] for x in a], [x["loss"] for x in b], rtol=1e-4, atol=1e-5)
    assert yaml.safe_load((two / "recipe.yaml").read_text()) == recipe.model_dump(mode="json")


def test_gradients_that_only_one_process_has(tmp_path: Path) -> None:
    """Its sum reaches both; a parameter without any gradient is not even moved by weight decay."""
    script, found = str(Path(__file__).with_name("gradients_of_two.py")), {}
    for name, start in (("one", [sys.executable]), ("two", TWO)):
        (tmp_path / name).mkdir()
        status, printed = run_group([*start, script, str(tmp_path / name)], tmp_path)
        assert status == 0, printed
        found[name] = [json.loads(path.read_text()) for path in sorted((tmp_path / name).glob("*.json"))]
    assert len(found["two"]) == 2 and found["two"][0] == found["two"][1]
    expected = found["one"][0]
    assert expected["nobody"] == found["two"][0]["nobody"] == [1.0, 1.0]
    assert expected["first"][0] < 0.9
    for name in ("first", "second"):
        torch.testing.assert_close(found["two"][0][name], expected[name])
