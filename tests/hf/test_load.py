"""`load` says which file or name is wrong, and keeps position embeddings in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from linearize import registry
from linearize.errors import UserError
from linearize.hf.export import export
from linearize.hf.load import load
from linearize.swap import swapped


@pytest.fixture
def folder(converted: Any, pico_tokenizer: Any, tmp_path: Path) -> Path:
    return export(converted("lolcats", "LSL"), pico_tokenizer, tmp_path / "model", max_shard_size="20KB")


def edit_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_loads_with_dtype_and_device(folder: Path, converted: Any) -> None:
    model, tokenizer = load(folder, dtype="bfloat16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    inv_freq = model.model.rotary_emb.inv_freq
    assert inv_freq.dtype == torch.float32
    assert torch.equal(inv_freq, converted("lolcats").model.rotary_emb.inv_freq)
    assert not model.training
    assert tokenizer.decode(tokenizer("abc").input_ids) == "abc"


def test_loads_a_source_model(pico_model: Any, pico_tokenizer: Any, tmp_path: Path) -> None:
    source = pico_model()
    source.save_pretrained(tmp_path)
    pico_tokenizer.save_pretrained(tmp_path)
    model, _ = load(str(tmp_path))
    ids = torch.arange(2, 20)[None]
    assert type(model) is type(source) and torch.equal(model(ids).logits, source(ids).logits)


@pytest.mark.parametrize("path", ["./missing/model", "/missing", "~/missing-model"])
def test_missing_folder(path: str) -> None:
    with pytest.raises(UserError, match=r"missing.* does not exist; give a checkpoint's folder, or a hub"):
        load(path)


def test_unreachable_hub() -> None:
    with pytest.raises(UserError, match=r"cannot load 'nobody/nothing'.*HF_HUB_OFFLINE is set.*a local copy"):
        load("nobody/nothing")


def test_file_instead_of_folder(folder: Path) -> None:
    with pytest.raises(UserError, match=r"config.json is a file; give a checkpoint's folder"):
        load(folder / "config.json")


def test_unfinished_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config.json, so it is not a finished"):
        load(folder)


def test_config_without_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(UserError, match=r"has a config.json but no weights .*convert or download it again"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pickled weights .* never read"):
        load(folder)


def test_truncated_shard_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{shard.name} is damaged .*fetch or convert the checkpoint again"):
        load(folder)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing; model.safetensors.index.json names it"):
        load(folder)


def test_unknown_mixer(folder: Path) -> None:
    edit_config(folder, lambda config: config["linearize"]["mixers"][0].update(type="lolcat"))
    with pytest.raises(UserError, match=r"unknown mixer 'lolcat'; did you mean 'lolcats'\?"):
        load(folder)


def test_weights_of_another_conversion(folder: Path) -> None:
    edit_config(folder, lambda config: config["linearize"].update(layers=[0, 0, 0]))
    with pytest.raises(UserError, match=r"lacks 3 tensors .*model.layers.1.self_attn.mixer.combine.window_factor"):
        load(folder)


def test_weights_of_other_sizes(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(intermediate_size=47))
    with pytest.raises(UserError, match="has tensors of other sizes than its config.json says"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{}", "the configuration of .* cannot be read"),
        ("config.json", "[]", "config.json is damaged: it holds no JSON object but .*; copy or download it again"),
        ("config.json", "3", "config.json is damaged: it holds no JSON object but '3'"),
        ("generation_config.json", "[]", "generation_config.json is damaged: it holds no JSON object"),
        ("tokenizer.json", "{", "has no tokenizer that loads"),
        ("tokenizer.json", "{}", "has no tokenizer that loads"),
        ("tokenizer_config.json", "{", "has no tokenizer that loads"),
        ("tokenizer_config.json", "[]", "has no tokenizer that loads"),
    ],
)
def test_damaged_files_are_named(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_unknown_dtype(folder: Path) -> None:
    with pytest.raises(UserError, match="unknown dtype 'bf17'"):
        load(folder, dtype="bf17")
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        load(folder, dtype="int8")


def test_a_checkpoint_cannot_make_the_toolkit_import_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted.py").write_text("raise SystemExit('code of a checkpoint ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit_config(folder, lambda config: config["linearize"]["mixers"][0].update(type="planted:Mixer"))
    for loads in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(UserError, match="'planted:Mixer' is code outside this toolkit.*trust_remote_code=True"):
            loads(folder)
    with pytest.raises(SystemExit):
        load(folder, trust_remote_code=True)
    edit_config(folder, lambda config: config["linearize"]["mixers"][0].update(type="os:system"))
    with pytest.raises(UserError, match="'os:system' is not a Mixer class"):
        load(folder)


@pytest.mark.parametrize("key", registry.keys("mixers"))
def test_from_config_initialises_the_mixers(converted: Any, key: str) -> None:
    reference = converted(key, "LSL")
    for name, attn in swapped(reference).items():
        attn.mixer.initialise(f"{name}.mixer", seed=0)
    expected = dict(reference.named_parameters())
    fresh = [AutoModelForCausalLM.from_config(reference.config) for _ in range(3)]
    for model in fresh:  # memory that was not written would differ between them
        for name, parameter in model.named_parameters():
            if ".mixer." in name:
                assert torch.equal(parameter, expected[name]), name
