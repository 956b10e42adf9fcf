"""What each command does with its arguments, on pico models, offline."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from trainable import make_recipe

import linearize
from linearize.cli._arguments import probes
from linearize.cli.main import main
from linearize.evals.evaluate import evaluate as evaluate_function
from linearize.recipe import Recipe


@pytest.fixture
def checkpoint(converted: Any, pico_tokenizer: Any, tmp_path: Path) -> str:
    """Folder of a converted pico model, without a recipe."""
    from linearize.hf.export import export

    return str(export(converted("lolcats"), pico_tokenizer, tmp_path / "checkpoint"))


@pytest.fixture
def config_only(pico_config: Any, tmp_path: Path) -> str:
    """A model folder that has a configuration but neither weights nor tokenizer."""
    pico_config(dtype="float32").save_pretrained(tmp_path / "source")
    return str(tmp_path / "source")


@pytest.mark.parametrize("command", ["plan", "convert --dry-run"])
def test_a_plan_needs_no_weights_and_writes_nothing(
    command: str,
    config_only: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    line = [*command.split(), "--model", config_only, "layers=LSL", "--recipe", "lolcats", "mixer.window=8"]
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 swapped: LSL" in printed and "window=8" in printed and config_only in printed
    assert not list(here.iterdir())


def test_a_recipe_that_does_not_fit_the_model_fails_in_the_plan(
    config_only: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", config_only, "layers=[7]"]) == 2
    assert capsys.readouterr().err == "error: layers: [7] not in this model; it has layers 0 to 2\n"


def test_convert_hands_over_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    from linearize import pipeline

    calls: list[Any] = []
    monkeypatch.setattr(pipeline, "convert", lambda *args, **options: calls.append((args, options)))
    line = "convert stages.0.tokens=2k --model demo -o there mixer.window=16 --resume --recipe lolcats"
    assert main(line.split()) == 0
    recipe = Recipe.load("lolcats", "demo", ["stages.0.tokens=2k", "mixer.window=16"])
    assert calls == [((recipe, "there"), {"resume": True})]


def test_convert_makes_a_checkpoint(
    pico_model: Any,
    pico_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("linearize.data.dataset.HF_HOME", str(tmp_path / "hf"))
    for part in (pico_model(), pico_tokenizer):
        part.save_pretrained(tmp_path / "source")
    (tmp_path / "train.txt").write_text("the cat sat on the mat. " * 100)
    recipe = {
        "model": {"name": str(tmp_path / "source"), "device": "cpu"},
        "layers": "LSL",
        "mixer": {"type": "lolcats", "window": 8},
        "data": {"source": str(tmp_path / "train.txt"), "seq_len": 32},
        "stages": [
            {"type": "attention_transfer", "tokens": 128, "batch_size": 2},
            {"type": "finetune", "tokens": 128, "batch_size": 2, "lora": {"r": 2}},
        ],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    line = ["convert", "--recipe", str(tmp_path / "mine.yaml"), "-o", str(out), "stages.1.lr=1e-3"]
    assert main(line) == 0
    assert f"checkpoint written to {out}" in capsys.readouterr().out
    assert yaml.safe_load((out / "recipe.yaml").read_text())["stages"][1]["lr"] == 1e-3
    assert main(["generate", str(out), "--prompt", "the cat", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("the cat")
    assert main(line) == 2
    assert "holds a conversion (go on with --resume)" in capsys.readouterr().err
    assert main([*line, "--resume"]) == 0


def test_evaluate_has_the_defaults_of_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Nothing:
        def table(self) -> str:
            return ""

    def record(path: str, **options: Any) -> Nothing:
        options.pop("say")("this")
        calls.append((path, options))
        return Nothing()

    monkeypatch.setattr(linearize, "evaluate", record, raising=False)
    assert main(["evaluate", "folder"]) == 0
    line = "evaluate folder --teacher none --tasks a,b --no-recall --lengths 8,16 --limit 3 --no-branches"
    assert main([*line.split(), "--prompt", "x y"]) == 0
    signature = inspect.signature(evaluate_function).parameters
    defaults = {name: p.default for name, p in signature.items() if name not in ("path", "say")}
    options = {"teacher": False, "tasks": ["a", "b"], "recall": False, "branches": False}
    options |= {"lengths": [8, 16], "limit": 3, "sample_prompt": "x y"}
    assert calls == [("folder", defaults), ("folder", {**defaults, **options})]


def test_evaluate_measures_a_checkpoint(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, report = tmp_path / "text.txt", tmp_path / "new" / "report.json"
    text.write_text("the cat sat on the mat. " * 40)
    line = [
        "evaluate",
        checkpoint,
        "--teacher",
        "none",
        "--text",
        str(text),
        "--lengths",
        "32",
        "--windows",
        "2",
    ]
    assert main([*line, "--no-recall", "--output", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "loss 32" in printed and "linear off" in printed and str(report) in printed
    assert json.loads(report.read_text())["student"]["losses"][0]["length"] == 32


def test_generate_streams_what_the_model_writes(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    def written(*options: str) -> str:
        line = ["generate", checkpoint, "--prompt", "some words to begin with", "--max-new-tokens", "12"]
        assert main([*line, *options]) == 0
        return capsys.readouterr().out

    student = written()
    assert student.startswith("some words to begin with") and len(student.strip()) > len("some words to begin with")
    assert written() == student
    teacher = written("--teacher")
    assert teacher != student and teacher.startswith("some words to begin with")
    sampled = {written("--temperature", "2", "--seed", seed) for seed in "111"}
    assert len(sampled) == 1 and written("--temperature", "2", "--seed", "2") not in sampled


def test_generate_says_what_it_cannot_do(
    pico_model: Any, pico_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in (pico_model(), pico_tokenizer):
        part.save_pretrained(tmp_path / "plain")
    assert main(["generate", str(tmp_path / "plain"), "--prompt", "a", "--teacher"]) == 2
    assert "has no swapped layers, so --teacher changes nothing; leave it out" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "plain"), "--prompt", ""]) == 2
    assert "error: --prompt has no tokens" in capsys.readouterr().err
    assert main(["generate", "lama-3-8b", "--prompt", "a"]) == 2
    assert "unknown model 'lama-3-8b'; did you mean 'llama-3-8b'?" in capsys.readouterr().err


def test_bench_times_random_weights_and_checkpoints(
    checkpoint: str, config_only: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--lengths", "16,32", "--decode-tokens", "2", "--repeats", "1"]
    report = tmp_path / "bench.json"
    recipe = make_recipe(tmp_path, evaluation={"text": str(tmp_path / "train.jsonl")})
    Path(checkpoint, "recipe.yaml").write_text(recipe.to_yaml())
    drafts = ["--drafts", "2", "--train-length", "0"]
    for model in ([checkpoint, *drafts], ["--shape", config_only, "--mixer", "liger", "--dtype", "float32"]):
        assert main(["bench", *model, *quick, "--output", str(report)]) == 0
        assert capsys.readouterr().out.count("| student / teacher") >= 2
        assert [row["length"] for row in json.loads(report.read_text())["speeds"]] == [16, 16, 32, 32]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bench", "give either the PATH of a checkpoint or --shape"),
        ("bench there --shape llama-3-8b", "give either the PATH of a checkpoint or --shape"),
        ("bench there --mixer liger", "--mixer goes with --shape; there has its own mixers"),
        ("bench --shape llama-3-8c", "unknown shape 'llama-3-8c'; did you mean 'llama-3-8b'?"),
        ("bench --shape llama-3.2-1b --lengths 8 --drafts 4 --train-length 0", "--drafts decodes text of a checkpoint"),
        ("bench --shape llama-3-8b --dtype float3", "unknown dtype 'float3'; known: bfloat16"),
    ],
)
def test_bench_says_what_it_cannot_do(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("llama-3-8b/lolcats ") and "LoLCATs for Llama 3 8B" in line for line in listed)
    assert main(["recipes", "llama-3-8b/lolcats"]) == 0
    text = capsys.readouterr().out
    source = Path(text.splitlines()[0].removeprefix("# "))
    assert source.name == "lolcats.yaml" and text.endswith(source.read_text())
    assert main(["recipes", "demo/lolcats"]) == 0  # extends another, and is printed in full
    text = capsys.readouterr().out
    assert Path(text.splitlines()[0].removeprefix("# ")).name == "lolcats.yaml" and "extends" not in yaml.safe_load(
        text
    )
    (tmp_path / "mine.yaml").write_text(text)
    assert Recipe.load(tmp_path / "mine.yaml") == Recipe.load("demo/lolcats")
    assert yaml.safe_load(text)["model"]["name"] == "demo"
    assert main(["recipes", "demo/lolcat"]) == 2
    assert "unknown recipe 'demo/lolcat'; did you mean 'demo/lolcats'?" in capsys.readouterr().err


def test_doctor_tells_versions_and_no_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_secret1")
    monkeypatch.setattr(constants, "ENDPOINT", "https://user:secret2@mirror.example/hub")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    rows = {line[2:26].strip(): line[26:] for line in printed.splitlines() if line.startswith("  ")}
    assert rows["torch"] == torch.__version__ and rows["linearize"] == linearize.__version__
    assert rows["token"] == "set" and rows["endpoint"] == "https://mirror.example/hub"
    assert rows["offline mode"] == "on (HF_HUB_OFFLINE)" and "reachable" not in rows
    assert rows["auto on cpu"].startswith("torch (the fla kernels need a CUDA tensor")
    assert "secret" not in printed


def test_doctor_asks_the_endpoint_only_if_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing listens
    assert main(["doctor", "--online"]) == 0
    assert "reachable               no: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mqar, recall", ["mqar", "recall"]),
        (
            "mqar(pairs=8, lengths=[512, 1k]),passkey()",
            [{"type": "mqar", "pairs": 8, "lengths": [512, "1k"]}, {"type": "passkey"}],
        ),
        ("my.module:Probe(names={a: [b, c]})", [{"type": "my.module:Probe", "names": {"a": ["b", "c"]}}]),
    ],
)
def test_probes_with_settings(text: str, expected: list) -> None:
    assert probes(text) == expected


@pytest.mark.parametrize("text", ["mqar(8)", "mqar(pairs=8", "mqar(pairs=[)", "passkey(type=facts)"])
def test_probes_that_cannot_be_read(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write name|not YAML"):
        probes(text)
