"""Exports a converted model as an architecture that transformers already has, where it is exactly one.

`native_of(config)` picks the architecture from the configuration alone, or says what stands in the way; `native_model`
fills it, and `check` compares its logits with the converted model's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights

from linearize.arguments import cache_of, continued
from linearize.errors import UserError
from linearize.evals.text import evaluating
from linearize.natives.base import Native
from linearize.registry import find, keys

TOLERANCE = 0.03
"""Largest difference of a token's logits that passes: its root mean square, over that of all logits. It leaves room for
weights rounded to half precision and for kernels that multiply float32 in fewer digits; what is put in the wrong place
differs by far more.
"""
ROWS, TOKENS, PADDING = 8, 70, 9
"""Rows that are compared, their tokens, more than a chunk of either recurrence, and the padding of every other row."""


def native_of(config: Any) -> type[Native]:
    """The architecture of transformers that a converted model with this configuration is.

    Raises:
        UserError: for a model that is none; it names every obstacle of every architecture.
    """
    lines = []
    for key in keys("natives"):
        native = find("natives", key, Native)
        if not (obstacles := native.obstacles(config)):
            return native
        lines += [f"{key}: {obstacle}" for obstacle in obstacles]
    raise UserError(
        "export.native: this model is no architecture that transformers has; leave it out, or change what differs:\n  "
        + "\n  ".join(lines)
    )


def native_config(source: Any, description: Mapping[str, Any]) -> Any:
    """The configuration of a converted model, as `native_of` reads it, from its source's and what the swap will do."""
    config = copy.deepcopy(source)
    config.linearize = dict(description)
    return config


@torch.no_grad()
def native_model(model: Any) -> Any:
    """The converted `model` as the architecture of transformers that it is; tensors that are the same are shared.

    Raises:
        UserError: for a model that is none, that has tensors without a place, or whose logits differ.
    """
    native = native_of(model.config)
    with init_empty_weights(include_buffers=False):
        made = native.model_class(native.config(model.config))
    left = dict(model.state_dict())
    tensors = native.weights(left, model.config)
    wrong = {
        "has no place for": sorted(left) + sorted(tensors.keys() - made.state_dict().keys()),
        "is not given": sorted(made.state_dict().keys() - tensors.keys()),
    }
    for what, names in wrong.items():
        if names:
            raise UserError(
                f"export.native: {type(made).__name__} {what} {len(names)} tensors, such as {names[0]}; leave it out"
            )
    made.load_state_dict(tensors, assign=True)
    made.tie_weights()
    made.generation_config = copy.deepcopy(model.generation_config)
    made = made.to(model.device).eval()
    check(model, made)
    return made


@torch.no_grad()
def check(model: Any, made: Any) -> None:
    """Compare the logits of both models: of rows at once, half of them padded on the left, and of a token after them.

    Both compute in float32 at least, whatever the type of the weights: what is seen is then what rounding the weights
    did, and not the rounding of every product. It is the median over tokens, because a router that is nearly undecided
    may take another expert.

    Raises:
        UserError: where they differ by more than `TOLERANCE`.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(0)).to(model.device)
    mask = torch.ones_like(ids)
    mask[1::2, :PADDING] = 0
    ours, theirs = (_logits(each, ids, mask) for each in (model, made))
    apart = (ours - theirs).square().mean(-1).sqrt() / ours[mask.bool()].square().mean().sqrt()
    for row, rows in enumerate(("rows", "padded rows")):
        for what, part in ((rows, apart[row::2, PADDING:-1]), (f"a token from the cache of {rows}", apart[row::2, -1])):
            if not (found := float(part.median())) <= TOLERANCE:
                raise UserError(_differs(model, made, what, found))


def _differs(model: Any, made: Any, what: str, found: float) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    remedy = "" if model.dtype.itemsize > 2 else "export in float32 (model.dtype: float32), or "
    return (
        f"export.native: on {what} the logits of {type(made).__name__} in {dtype} differ from the converted model's by "
        f"{found:.2g} of their size, more than {TOLERANCE:g}; {remedy}leave export.native out"
    )


def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, T, vocabulary] float32: all tokens but the last at once, and the last from the cache."""
    with evaluating(model), _in_float32(model):
        first = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        last = continued(model, cache_of(first), input_ids=ids[:, -1:], attention_mask=mask)
    return torch.cat([first.logits, last.logits], dim=1).float()


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """Inside the context half-precision weights are float32 while their layer runs, which takes little memory.

    Softmax layers take transformers' plain kernel, because not every one knows float32.
    """
    if model.dtype in (torch.float32, torch.float64):
        yield
        return
    children = [each for child in model.get_decoder().children() for each in _layers(child)]
    units = [unit for unit in [*children, model.get_output_embeddings()] if any(True for _ in unit.parameters())]
    held: dict[torch.nn.Module, list[torch.Tensor]] = {}

    def widen(unit: torch.nn.Module, args: Any) -> None:
        held[unit] = [parameter.data for parameter in unit.parameters()]
        unit.float()

    def restore(unit: torch.nn.Module, args: Any, output: Any) -> None:
        for parameter, data in zip(unit.parameters(), held.pop(unit), strict=True):
            parameter.data = data

    hooks = [unit.register_forward_pre_hook(widen) for unit in units]
    hooks += [unit.register_forward_hook(restore, always_call=True) for unit in units]
    attention, model.config._attn_implementation = model.config._attn_implementation, "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = attention
        for hook in hooks:
            hook.remove()


def _layers(child: torch.nn.Module) -> list[torch.nn.Module]:
    return list(child) if isinstance(child, torch.nn.ModuleList) else [child]
