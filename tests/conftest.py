"""Shared fixtures: pico models and a pico tokenizer made on the spot, offline, on one thread.

`pico_model(...)` is a randomly initialised three-layer Llama, `converted(key, layers)` the same model with a
mixer in some of its layers. Both are factories: call them as often as a test needs.
"""

from __future__ import annotations

import os
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Read when the libraries are imported, so they are set before any test module is.
_MODULES = tempfile.TemporaryDirectory(prefix="linearize-tests-", ignore_cleanup_errors=True)
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_MODULES_CACHE=_MODULES.name,
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)

VOCAB = 97
LAYERS = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def pico_config() -> Callable[..., Any]:
    """Factory (**overrides) -> LlamaConfig: hidden 32, 4 heads, 2 key heads, 3 layers, vocabulary 97."""
    from transformers import LlamaConfig

    def make(**overrides: Any) -> LlamaConfig:
        values: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,  # large enough that greedy choices are not decided by rounding
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            "tie_word_embeddings": False,
        }
        return LlamaConfig(**{**values, **overrides})

    return make


@pytest.fixture
def pico_model(pico_config: Callable[..., Any]) -> Callable[..., Any]:
    """Factory (seed=0, **config overrides) -> LlamaForCausalLM in float32, eval mode."""
    import torch
    from transformers import LlamaForCausalLM

    def make(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(pico_config(**overrides)).eval()

    return make


@pytest.fixture
def converted(pico_model: Callable[..., Any]) -> Callable[..., Any]:
    """Factory (mixer key, layers="LLL", seed=0, settings=None, family="llama", **config overrides) -> converted model.

    `layers` has one letter per layer, L for the mixer and S for the softmax layer that stays. Windows are 8
    tokens and chunks 16, so that short tests cross both; the mixer's parameters are moved away from their
    symmetric first values. The model is in eval mode.
    """
    import torch

    from linearize.hf.auto import linearized
    from linearize.swap import swapped

    def make(
        key: str,
        layers: str = "L" * LAYERS,
        seed: int = 0,
        settings: Any = None,
        family: str = "llama",
        **overrides: Any,
    ) -> Any:
        import pico

        overrides = {"num_hidden_layers": len(layers), **overrides}
        model = pico_model(seed, **overrides) if family == "llama" else pico.pico_model(family, seed, **overrides)
        mixer = {**pico.small_mixer(key), **(settings or {})}
        index = [0 if letter == "L" else None for letter in layers]
        linearized(model, {"mixers": [mixer], "layers": index})
        noise = torch.Generator().manual_seed(seed)
        for name, attn in swapped(model).items():
            attn.mixer.initialise(f"{name}.mixer", seed=seed)
            for parameter in attn.mixer.parameters():
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=noise)
        return model.eval()

    return make


@pytest.fixture
def pico_tokenizer() -> Any:
    """One token per printable ASCII character, `<s>` 0, `</s>` 1 (also the padding): 97 in all."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", *string.printable[:95]]
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="</s>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=512
    )


@pytest.fixture
def source(
    pico_model: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with a source checkpoint and a training text, and the cache of prepared data."""
    from trainable import write_source

    monkeypatch.setattr("linearize.data.dataset.HF_HOME", str(tmp_path / "hf"))
    write_source(tmp_path, pico_model(), pico_tokenizer)
    return tmp_path
