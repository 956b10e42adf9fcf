"""Small data sets, stages and recipes for the tests of training; the text has words that a pico model can learn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from linearize.data import DataConfig, PackedDataset, prepare
from linearize.families.base import Family
from linearize.recipe import Recipe
from linearize.registry import find
from linearize.stages.base import Stage

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs")


def write_documents(path: Path, documents: int = 120, seed: int = 0) -> Path:
    """A .jsonl file of short documents, 10 to 40 characters each."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 10))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_pairs(path: Path, pairs: int = 60, seed: int = 0) -> Path:
    """A .jsonl file of prompts with two replies each; the chosen one is about cats, the rejected one about dogs."""
    rng = random.Random(seed)
    rows = [
        {
            "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 3))),
            "chosen": f" cat{' sat' * rng.randint(0, 2)}",
            "rejected": f" dogs{' saw' * rng.randint(0, 2)}",
        }
        for _ in range(pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(folder: Path, tokenizer: Any, **settings: Any) -> PackedDataset:
    """Preference pairs in rows of 32 tokens."""
    config = {"source": str(write_pairs(folder / "pairs.jsonl")), "format": "preference", "seq_len": 32, **settings}
    return prepare(DataConfig(**config), tokenizer, cache_dir=folder / "cache")


def dataset(folder: Path, tokenizer: Any, **settings: Any) -> PackedDataset:
    """Packed rows of 32 tokens with several documents each; `packing=False` gives padded rows instead."""
    source = write_documents(folder / "train.jsonl")
    config = DataConfig(**{"source": str(source), "seq_len": 32, **settings})
    return prepare(config, tokenizer, cache_dir=folder / "cache")


def make_stage(key: str, **settings: Any) -> Any:
    """A stage for Llama models; 4 sequences a step, one step unless `steps` says more."""
    cls = find("stages", key, Stage)
    steps = settings.pop("steps", 1)
    return cls(cls.Config.model_validate({"batch_size": 4, "tokens": steps * 4 * 32, **settings}), find_llama())


def find_llama() -> type[Family]:
    return find("families", "llama", Family)


def snapshot(model: Any) -> dict[str, Any]:
    """A copy of every tensor of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a stage's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_source(folder: Path, model: Any, tokenizer: Any) -> Path:
    """A source checkpoint on disk."""
    for part in (model, tokenizer):
        part.save_pretrained(folder / "source")
    return folder / "source"


def recipe_dict(folder: Path, **sections: Any) -> dict[str, Any]:
    """A recipe for the model of `write_source(folder)`: lolcats in layers 0 and 2, both stages, nothing measured."""
    values: dict[str, Any] = {
        "model": {"name": str(folder / "source"), "device": "cpu"},
        "layers": "LSL",
        "mixer": {"type": "lolcats", "window": 8, "chunk_size": 16},
        "data": {"source": str(write_documents(folder / "train.jsonl")), "seq_len": 32},
        "stages": [
            {"type": "attention_transfer", "tokens": 256, "batch_size": 4},
            {"type": "finetune", "tokens": 256, "batch_size": 4, "lr": 1e-3, "lora": {"r": 2}},
        ],
    }
    return {**values, **sections}


def make_recipe(folder: Path, **sections: Any) -> Recipe:
    """`recipe_dict` validated."""
    return Recipe.parse(recipe_dict(folder, **sections))
