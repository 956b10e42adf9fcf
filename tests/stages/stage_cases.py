"""Batches of every layout, and what the unconverted model's attention does with them, by plain hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trainable import dataset

KINDS = ("plain", "packed", "padded")


def batch_of(kind: str, folder: Path, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Four rows: one document each without padding ("plain"), several documents, or right-padded."""
    data = dataset(folder, tokenizer, packing=kind != "padded")
    batch = data.batch(range(4))
    if kind == "plain":
        batch["position_ids"] = torch.arange(32).expand(4, -1)
    assert (kind == "padded") == ("attention_mask" in batch)
    assert (kind == "packed") == bool((batch["position_ids"][:, 1:] == 0).any())
    return batch


def teacher_run(source: Any, batch: dict[str, torch.Tensor]) -> dict[int, dict[str, Any]]:
    """Per layer of the unconverted model: attention's input, heads, output, position embeddings and weights."""
    seen: dict[int, dict[str, Any]] = {i: {} for i in range(len(source.model.layers))}
    hooks = []
    for i, layer in enumerate(source.model.layers):

        def attention(m: Any, args: Any, kwargs: Any, output: Any, i: int = i) -> None:
            seen[i] |= {"x": kwargs["hidden_states"], "rotary": kwargs["position_embeddings"]}
            seen[i] |= {"output": output[0], "weights": output[1]}

        def projection(m: Any, args: Any, i: int = i) -> None:
            seen[i]["heads"] = args[0]

        hooks.append(layer.self_attn.register_forward_hook(attention, with_kwargs=True))
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(projection))
    with torch.no_grad():
        source(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def trainable(stage: Any, model: Any) -> dict[str, torch.nn.Parameter]:
    """What `stage` trains, ready for a backward; everything else is frozen."""
    for p in model.parameters():
        p.requires_grad_(False)
        p.grad = None
    parameters = stage.prepare(model)
    for p in parameters.values():
        p.requires_grad_(True)
    return parameters
