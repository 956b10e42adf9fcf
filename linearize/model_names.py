"""Short names of models that people convert, and where a model's name leads."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

from linearize.errors import UserError, did_you_mean

ALIASES = {
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.3-70b-instruct": "meta-llama/Llama-3.3-70B-Instruct",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B-Base",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-vl-7b-instruct": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B-Base",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B-Base",
    "qwen3-4b": "Qwen/Qwen3-4B-Base",
    "qwen3-8b": "Qwen/Qwen3-8B-Base",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B-Base",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-9b": "google/gemma-2-9b",
    "gemma-3-1b": "google/gemma-3-1b-pt",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "phi-4": "microsoft/phi-4",
    "olmo-2-1b": "allenai/OLMo-2-0425-1B",
    "olmo-2-7b": "allenai/OLMo-2-1124-7B",
    "granite-3.3-2b": "ibm-granite/granite-3.3-2b-base",
    "granite-3.3-8b": "ibm-granite/granite-3.3-8b-base",
    "pythia-160m": "EleutherAI/pythia-160m",
    "pythia-1b": "EleutherAI/pythia-1b",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
    "all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2",
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "gpt2": "openai-community/gpt2",
    "gpt2-xl": "openai-community/gpt2-xl",
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
}
"""Short model names; `demo` is the small teacher inside the package."""

logger = logging.getLogger(__name__)


def resolve_model(name: str) -> str:
    """Alias -> hub name; `demo` -> the folder inside the package; anything else stays.

    A short name goes before a folder of that name with a model in it, of which a warning tells.

    Raises:
        UserError: for a name that is no alias, no folder and cannot be a hub name.
    """
    if name in ("demo", *ALIASES) and (Path(name) / "config.json").exists():
        _warn_of_folder(name, str(Path.cwd()))
    if name == "demo":
        from linearize.demo import model_path

        return str(model_path())
    if name in ALIASES:
        return ALIASES[name]
    if "/" not in name and not Path(name).exists():
        raise UserError(
            f"unknown model {name!r}{did_you_mean(name, ['demo', *ALIASES])}; "
            "or give a hub name (owner/name) or a folder"
        )
    return name


@cache
def _warn_of_folder(name: str, here: str) -> None:
    model = ALIASES.get(name, "the teacher inside the package")
    logger.warning("%s is taken for %s, not for the folder in %s; that is ./%s", name, model, here, name)
