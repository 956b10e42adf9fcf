"""Merging: means against float64, what stays the same to the bit, what is written, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import linearize
from linearize import merge as merging
from linearize.cli.main import main
from linearize.errors import UserError
from linearize.hf.export import export
from linearize.merge import mean, merge

IDS = torch.arange(2, 42)[None]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.fixture
def make(converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path) -> Callable[..., Path]:
    """Factory (name, seed, ...) -> folder of a converted checkpoint in several shards."""

    def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        size = options.pop("max_shard_size", "20KB")
        files = {"recipe.yaml": f"model: {{name: demo}}\nseed: {seed}\n", "README.md": "# A model\n"}
        model = converted("lolcats", "LSL", seed, **options).to(dtype)
        return export(model, pico_tokenizer, tmp_path / name, max_shard_size=size, extra_files=files)

    return build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_is_that_of_float64_in_the_type_of_the_inputs(
    make: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    a, b = make("a", 0, dtype), make("b", 1, dtype, max_shard_size="5GB")
    c = make("c", 2, dtype)
    out, shares = tmp_path / "out", [0.2, 0.5, 0.3]
    assert merge([a, b, c], out, shares) == out
    assert len(list(out.glob("model-*.safetensors"))) == len(list(a.glob("model-*.safetensors"))) > 1
    found, parts = tensors(out), [tensors(folder) for folder in (a, b, c)]
    assert found.keys() == parts[0].keys() and any(".mixer." in key for key in found)
    for key, tensor in found.items():
        exact = sum(share * part[key].double() for share, part in zip(shares, parts, strict=True))
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor.double(), exact, atol=1e-6, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6)
        assert not torch.equal(tensor, parts[0][key]) or "norm" in key, "norms begin at one everywhere"
    model, tokenizer = linearize.load(out)
    assert model.dtype == dtype and tokenizer is not None
    with torch.no_grad():
        logits = model(IDS).logits
        assert logits.isfinite().all()
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out, dtype=dtype)(IDS).logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_inputs_stay_to_the_bit(make: Callable[..., Path], tmp_path: Path, dtype: torch.dtype) -> None:
    a = make("a", 0, dtype)
    copies = [shutil.copytree(a, tmp_path / f"copy {i}") for i in range(2)]
    out = merge([a, *copies], tmp_path / "out")
    for file in a.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    special = torch.tensor([-0.0, 0.0, float("inf"), float("-inf")], dtype=dtype)
    found = mean("x", [special, special.clone()], [0.3, 0.7])
    assert torch.equal(found, special) and torch.equal(found.signbit(), special.signbit())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_whole_share_is_that_checkpoint_to_the_bit(
    make: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    a, b = make("a", 0, dtype), make("b", 1, dtype)
    out = merge([a, b], tmp_path / "out", [0, 1])
    for file in b.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    noise = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(1000, generator=noise).to(dtype) * 10**n for n in (0, 4, -4))
    assert torch.equal(mean("x", [x, y, z], [0, 0, 1]), z) and torch.equal(mean("x", [x, y, z], [1, 0, 0]), x)
    assert torch.equal(mean("x", [x * float("nan"), y, z], [0, 0.5, 0.5]), mean("x", [y, z], [0.5, 0.5]))
    count = torch.tensor([3])
    assert torch.equal(mean("n", [count, count + 1], [0.0, 1.0]), count + 1)


def test_files_and_notes(make: Callable[..., Path], tmp_path: Path) -> None:
    a, b = make("a", 0), make("b", 1)
    (a / "run").mkdir()
    (a / "run" / "log.txt").write_text("not of the checkpoint")
    (a / "pytorch_model.bin").write_text("old weights")
    out = merge([a, b], tmp_path / "out", [0.25, 0.75])
    names = {path.name for path in a.iterdir()} - {"run", "pytorch_model.bin"}
    assert {path.name for path in out.iterdir()} == names
    for name in names - {"README.md", "recipe.yaml"}:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (a / name).read_bytes(), name
    card, recipe = (out / "README.md").read_text(), (out / "recipe.yaml").read_text()
    assert card.startswith("# A model") and "## Merged" in card and "- 0.25 of a\n- 0.75 of b" in card
    assert "the recipe of b differs in seed (0, 1)" in card
    assert recipe.startswith("# Recipe of the first") and recipe.endswith((a / "recipe.yaml").read_text())


def test_ordinary_checkpoints_and_the_command(
    pico_model: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate("ab"):
        pico_model(seed).save_pretrained(tmp_path / name)
        pico_tokenizer.save_pretrained(tmp_path / name)
    a, b, out = (str(tmp_path / name) for name in ("a", "b", "out"))
    assert main(["merge", a, b, "--weights", "0.5,0.5", "-o", out]) == 0
    assert f"checkpoint written to {out}" in capsys.readouterr().out
    parts = pico_model(0).state_dict(), pico_model(1).state_dict()
    for key, tensor in linearize.load(out)[0].state_dict().items():
        torch.testing.assert_close(tensor.double(), (parts[0][key].double() + parts[1][key].double()) / 2)
    assert main(["merge", a, b, "-o", out]) == 2
    assert "exists; choose another with -o" in capsys.readouterr().err
    assert main(["merge", a, b, "--weights", "half", "-o", str(tmp_path / "no")]) == 2
    assert "list of numbers" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_and_nothing_written(
    make: Callable[..., Path], converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path
) -> None:
    a, b, out = make("a"), make("b", 1), tmp_path / "out"

    def refused(folders: list[Path], message: str, weights: list[float] | None = None) -> None:
        with pytest.raises(UserError, match=message):
            merge(folders, out, weights)
        assert not out.exists() and not list(tmp_path.glob(".out*"))

    refused([a], "two or more checkpoints, got 1")
    refused([a, b, a.parent / "x" / ".." / a.name], "is given 2 times; name each checkpoint once")
    refused([a, b], "2 checkpoints need as many weights, got 1: 1", [1.0])
    refused([a, b], "weights 0.5,0.6 must lie from 0 to 1 and sum to 1, and they sum to 1.1", [0.5, 0.6])
    refused([a, b], "weights -0.5,1.5 must lie", [-0.5, 1.5])
    refused([a, b], "weights -1,2 must lie from 0 to 1 and sum to 1, and -1 does not", [-1, 2])
    refused([a, b], "nan does not", [float("nan"), 0.5])
    refused([a, tmp_path / "none"], "none does not exist")
    other = export(converted("gdn", "LSL"), pico_tokenizer, tmp_path / "gdn")
    refused([a, other], "differ in their configuration, linearize.mixers.0.type \\('lolcats', 'gdn'\\)")
    refused([a, make("wide", intermediate_size=64)], "configuration, intermediate_size \\(48, 64\\)")
    refused([a, make("half", dtype=torch.bfloat16)], "differ in their configuration, dtype")
    config = (a / "config.json").read_text()
    (tmp_path / "half" / "config.json").write_text(config)
    refused([a, tmp_path / "half"], r"differ in tensor \S+: F32 .* and BF16")
    (tmp_path / "gdn" / "config.json").write_text(config)
    refused([a, tmp_path / "gdn"], r"hold different tensors: \d+ are in one alone, such as")
    (b / "adapter").mkdir()
    (b / "adapter" / "adapter_config.json").write_text("{}")
    refused([a, b], "holds a LoRA adapter .*; merge it into the weights first")


def test_other_vocabularies_are_refused_whatever_their_size(make: Callable[..., Path], tmp_path: Path) -> None:
    a, b, out = make("a"), make("b", 1), tmp_path / "out"
    file = b / "tokenizer.json"
    told = json.loads(file.read_text())
    vocab = told["model"]["vocab"]
    one, other = sorted(vocab, key=vocab.get)[-2:]
    told["model"]["vocab"] = {**vocab, one: vocab[other], other: vocab[one]}
    file.write_text(json.dumps(told))
    with pytest.raises(UserError, match=f"different vocabularies: token {vocab[one]} is .* in one and"):
        merge([a, b], out)
    told["model"]["vocab"] = {k: v for k, v in vocab.items() if k != other}
    told["added_tokens"] = [*told.get("added_tokens", []), {"id": len(vocab) + 999, "content": "<chat>"}]
    file.write_text(json.dumps(told))
    assert merge([a, b], out) == out, "a token that one of them alone has clashes with none"
    file.write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer.json is damaged"):
        merge([a, b], tmp_path / "other")


def test_where_nothing_can_be_written_and_an_index_that_is_not_read(make: Callable[..., Path], tmp_path: Path) -> None:
    a, b = make("a", max_shard_size="5GB"), make("b", 1)
    with pytest.raises(UserError, match="cannot be written"):
        merge([a, b], a / "config.json" / "out")
    shutil.copy(b / "model.safetensors.index.json", a)
    out = merge([a, b], tmp_path / "out")
    assert (out / "model.safetensors").is_file() and not (out / "model.safetensors.index.json").exists()


def test_whole_numbers_must_be_the_same_and_a_failure_leaves_nothing(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = torch.tensor([3])
    assert torch.equal(mean("n", [count, count], [0.5, 0.5]), count)
    with pytest.raises(UserError, match=r"tensor n holds whole numbers \(torch.int64\) that differ"):
        mean("n", [count, count + 1], [0.5, 0.5])
    a, b, written = make("a"), make("b", 1), []

    def failing(*args: Any) -> None:
        written.append(args)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(merging, "save_file", failing)
    with pytest.raises(KeyboardInterrupt):
        merge([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert json.loads((a / "config.json").read_text())
