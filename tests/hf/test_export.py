"""Exported folders load bit-equal with and without the toolkit, sharded, tied, and with mixers of others."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pico import KEYS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from linearize import registry
from linearize.errors import UserError
from linearize.hf.export import export, export_adapter
from linearize.hf.load import load

OUTSIDE = {
    "outside_mixer/__init__.py": "",
    "outside_mixer/halving.py": '''
"""A hedgehog of half the size of output."""
from linearize.mixers.hedgehog import (
    Hedgehog,  # the base
    HedgehogConfig,
)

from .part import half; ANSWER = "from linearize.hf import cache"


class Halving(Hedgehog):
    Config = HedgehogConfig

    def forward(self, *args, **kwargs):
        y, state = super().forward(*args, **kwargs)
        return half(y), state
''',
    "outside_mixer/part.py": """
def half(x):
    try:
        import fla
    except ImportError:
        fla = None
    return x / 2
""",
}


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, text in OUTSIDE.items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    return "outside_mixer.halving:Halving"


def ids() -> torch.Tensor:
    return torch.randint(2, 97, (2, 25), generator=torch.Generator().manual_seed(2))


def test_whoever_may_read_the_configuration_may_read_the_weights(converted, pico_tokenizer, tmp_path):
    out = export(converted("lolcats"), pico_tokenizer, tmp_path / "out", max_shard_size="20KB")
    shards = list(out.glob("*.safetensors"))
    assert len(shards) > 1
    assert {path.stat().st_mode for path in shards} == {(out / "config.json").stat().st_mode}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(ids()).logits


def realigned(model: Any) -> Any:
    """The model with its weights copied: as loaded they lie where the file has them, and the bits of a product with a
    single row, such as an expert's gate, depend on that.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def in_clean_process(tmp_path: Path, folders: list[Path]) -> dict[str, torch.Tensor]:
    save_file({"ids": ids()}, tmp_path / "ids.safetensors")
    script = Path(__file__).with_name("clean_process.py")
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    files = [tmp_path / "ids.safetensors", tmp_path / "out.safetensors"]
    done = subprocess.run([sys.executable, "-I", script, *files, *folders], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "out.safetensors")


def test_every_mixer_reloads_bit_equal_in_a_clean_process(
    converted: Any, pico_tokenizer: Any, outside: str, tmp_path: Path
) -> None:
    folders, models = [], []
    for key in [*registry.keys("mixers"), outside]:
        for layers, tied in (("LLL", True), ("LSL", False)):
            model = converted(key, layers, tie_word_embeddings=tied)
            name = f"{key.partition(':')[0]}-{layers}".replace(".", "_")
            folders.append(export(model, pico_tokenizer, tmp_path / name))
            models.append(model)
    results = in_clean_process(tmp_path, folders)
    for model, folder in zip(models, folders, strict=True):
        assert torch.equal(results[f"{folder.name}.logits"], logits(model)), folder.name
        mask = torch.ones_like(ids())
        greedy = model.generate(ids(), attention_mask=mask, max_new_tokens=12, do_sample=False)
        assert torch.equal(results[f"{folder.name}.greedy"], greedy), folder.name
        here = realigned(AutoModelForCausalLM.from_pretrained(folder))  # no trust_remote_code: linearize is imported
        assert type(here) is type(model) and torch.equal(logits(here), logits(model))


@pytest.mark.parametrize("layers", ["LLL", "LSL"])
def test_every_family_reloads_bit_equal_in_a_clean_process(
    converted: Any, pico_tokenizer: Any, tmp_path: Path, layers: str
) -> None:
    models = {key: converted("lolcats", layers, family=key) for key in KEYS}
    folders = [export(model, pico_tokenizer, tmp_path / key) for key, model in models.items()]
    results = in_clean_process(tmp_path, folders)
    for key, model in models.items():
        assert torch.equal(results[f"{key}.logits"], logits(model)), key
        mask = torch.ones_like(ids())
        greedy = model.generate(ids(), attention_mask=mask, max_new_tokens=12, do_sample=False)
        assert torch.equal(results[f"{key}.greedy"], greedy), key
        here = realigned(load(tmp_path / key)[0])
        assert type(here) is type(model) and torch.equal(logits(here), logits(model)), key


def test_the_toolkit_registers_by_itself_and_is_cheap_to_import(
    converted: Any, pico_tokenizer: Any, tmp_path: Path
) -> None:
    folder = export(converted(registry.keys("mixers")[0]), pico_tokenizer, tmp_path / "model")
    before = "import sys, linearize; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)\n"
    use = "from transformers import AutoModelForCausalLM\n"
    load = f"print(type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__module__)\n"
    for script in (before + use + load, use + "import linearize\n" + load):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.stdout == "linearize.hf.auto\n", done.stderr


@pytest.mark.parametrize("tied", [True, False])
def test_shards_and_tensor_names(pico_model: Any, converted: Any, tmp_path: Path, tied: bool) -> None:
    model = converted("lolcats", "LSL", tie_word_embeddings=tied)
    folder = export(model, None, tmp_path / "model", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    source = dict(pico_model(tie_word_embeddings=tied).named_parameters())  # lists a tied tensor once
    written = weights(folder)
    assert {name for name in written if ".mixer." not in name} == set(source)
    assert {name.partition(".mixer.")[0] for name in written if ".mixer." in name} == {
        "model.layers.0.self_attn",
        "model.layers.2.self_attn",
    }
    assert all(torch.equal(written[name], tensor) for name, tensor in source.items())


def test_exporting_again_keeps_only_the_run(converted: Any, pico_tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "log.txt").write_text("kept")
    (folder / "own.py").write_text("print('kept')\n")
    lora = get_peft_model(converted("lolcats"), LoraConfig(r=2, target_modules=["q_proj"]))
    export_adapter(lora, pico_tokenizer, folder, max_shard_size="20KB")
    assert (folder / "adapter").is_dir() and (folder / "mixers_lolcats.py").is_file()
    second = converted("liger", seed=1)
    export(second, pico_tokenizer, folder, extra_files={"recipe.yaml": "a: 1\n"})
    assert (folder / "run" / "log.txt").read_text() == "kept"
    assert (folder / "own.py").is_file() and not (folder / "adapter").exists()
    assert (folder / "recipe.yaml").read_text() == "a: 1\n"
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert not (folder / "mixers_lolcats.py").exists()
    assert torch.equal(logits(load(folder)[0]), logits(second))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    allowed = {".py", ".json", ".jinja", ".safetensors", ".yaml", ".txt"}
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= allowed


def test_a_full_disk_leaves_the_folder_as_it_was(
    converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = converted("lolcats")
    folder = export(first, None, tmp_path / "model")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("linearize.hf.export.os.fsync", full)
    with pytest.raises(UserError, match=r"no space left.*no file in the target folder has been changed"):
        export(converted("liger"), None, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(first))


def test_whatever_saves_the_model_saves_its_code(converted: Any, tmp_path: Path) -> None:
    model = converted("liger")
    model.save_pretrained(tmp_path / "saved")  # as the Hugging Face trainer does
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    module, _, name = config["auto_map"]["AutoModelForCausalLM"].partition(".")
    assert f"{name} = build_classes(" in (tmp_path / "saved" / f"{module}.py").read_text()
    assert type(AutoConfig.from_pretrained(tmp_path / "saved")) is type(model.config)


def test_adapter_beside_its_base(converted: Any, pico_tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = converted("lolcats", "LSL")
    plain = logits(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    expected = logits(model)
    assert not torch.allclose(expected, plain)
    with pytest.raises(UserError, match="merge them or use `export_adapter`"):
        export(model, pico_tokenizer, tmp_path / "wrong")
    folder = export_adapter(model, pico_tokenizer, tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(reloaded), plain)
    assert torch.equal(logits(PeftModel.from_pretrained(reloaded, folder / "adapter")), expected)
    assert torch.equal(logits(load(folder)[0]), expected)
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        assert all("lora_" in key for key in adapter.keys())  # noqa: SIM118


def test_tokenizer_and_chat_template_travel(converted: Any, pico_tokenizer: Any, tmp_path: Path) -> None:
    pico_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = export(converted("liger"), pico_tokenizer, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == pico_tokenizer.chat_template
    assert tokenizer("Hello, you!").input_ids == pico_tokenizer("Hello, you!").input_ids


def test_a_renamed_tensor_is_noticed(converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("lolcats")
    save = type(model).save_pretrained

    def renamed(model: Any, folder: Any, **options: Any) -> None:
        save(model, folder, **options)
        tensors = load_file(Path(folder) / "model.safetensors")
        tensors["lost"] = tensors.pop("model.layers.1.self_attn.q_proj.weight")
        save_file(tensors, Path(folder) / "model.safetensors")

    monkeypatch.setattr(type(model), "save_pretrained", renamed)
    with pytest.raises(RuntimeError, match=r"without model.layers.1.self_attn.q_proj.weight; nothing"):
        export(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_model_is_refused(pico_model: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="LlamaForCausalLM is not a converted model"):
        export(pico_model(), None, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
