"""Speculative decoding with a converted model: a cheap path through the same weights drafts, an exact one checks.

`speculate(model, ids)` decodes greedily through Hugging Face's assisted generation (Leviathan et al. 2022,
arXiv:2211.17192), and tells how many drafted tokens were accepted and how much faster it was than plain decoding. The
output is that of the exact path, but for rounding. Two pairs are tried: the mixers draft for the softmax teacher, and
in models with windows the window alone drafts for the whole mixers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from linearize.errors import UserError
from linearize.evals.text import evaluating
from linearize.memory import now
from linearize.mixers.base import branch_off, branches_of
from linearize.swap import swapped, teacher_path

Inside = Callable[[], AbstractContextManager]
"""Opens the context that a path runs in."""


@dataclass(frozen=True)
class Speculation:
    """One pair of paths, decoding the same prompts with and without drafts."""

    draft: str
    """What proposed tokens: mixers, or window."""
    target: str
    """What checked them: softmax, or mixers."""
    tokens: int
    """Tokens decoded, all prompts together."""
    drafted: int
    """Tokens proposed."""
    accepted: int
    """Proposed tokens that the target would have chosen itself."""
    plain: float
    """Tokens per second of the target alone."""
    assisted: float
    """Tokens per second with drafts."""
    same: float
    """Share of the prompts that were continued alike with and without; in low precision, where several tokens at once
    round otherwise than one, a tie can tip.
    """

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that were accepted."""
        return self.accepted / max(self.drafted, 1)


def speculate(model: Any, prompts: torch.Tensor, *, new_tokens: int = 64, drafts: int = 4) -> list[Speculation]:
    """Decode each prompt with every pair of paths that the model has.

    Args:
        model: a converted model; in evaluation mode meanwhile.
        prompts: [N, T] token ids, decoded one at a time, as assisted generation does.
        new_tokens: tokens to decode after each.
        drafts: tokens proposed at a time.

    Raises:
        UserError: for a model without mixers.
    """
    if not swapped(model):
        raise UserError("the model has no swapped layers, so it has nothing to draft with; give a converted model")
    softmax: Inside = partial(teacher_path, model)
    pairs: list[tuple[str, Inside, str, Inside]] = [("mixers", nullcontext, "softmax", softmax)]
    if {"window", "linear"} <= set(branches_of(model)):
        pairs.append(("window", partial(branch_off, model, "linear"), "mixers", nullcontext))
    with evaluating(model):
        return [_pair(model, prompts, pair, new_tokens, drafts) for pair in pairs]


def _pair(
    model: Any, prompts: torch.Tensor, pair: tuple[str, Inside, str, Inside], new_tokens: int, drafts: int
) -> Speculation:
    draft_name, draft_path, target_name, target_path = pair
    draft, target = view(model, draft_path), view(model, target_path)
    draft.generation_config.num_assistant_tokens = drafts
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    seconds, drafted, checked, same = [0.0, 0.0], 0, 0, 0
    for row in prompts.to(model.device).split(1):
        found = []
        for which, more in enumerate(({}, {"assistant_model": draft})):
            draft.calls = target.calls = 0
            began = now(model.device)
            found.append(target.generate(row, attention_mask=torch.ones_like(row), **options, **more))
            seconds[which] += now(model.device) - began
        drafted, checked, same = drafted + draft.calls, checked + target.calls, same + torch.equal(*found)
    tokens = len(prompts) * new_tokens
    # every forward of the target gives one token of its own beside the drafts that it accepts
    plain, assisted = (tokens / value for value in seconds)
    return Speculation(
        draft_name,
        target_name,
        tokens,
        drafted,
        accepted=tokens - checked,
        plain=plain,
        assisted=assisted,
        same=same / len(prompts),
    )


def view(model: Any, path: Inside) -> Any:
    """The same weights as another model object, all of whose forwards run inside `path()`; `calls` counts them."""
    cls = type(model)

    class View(cls):  # type: ignore[valid-type,misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            with path():
                return super().forward(*args, **kwargs)

        def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            with path():
                return super()._prepare_cache_for_generation(*args, **kwargs)

    View.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]  # generate reads it
    seen = copy.copy(model)
    seen.__class__ = View
    seen.calls = 0
    seen.generation_config = copy.deepcopy(model.generation_config)
    return seen
