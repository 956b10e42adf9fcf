"""Speculative decoding: the output is the target's and drafts are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from linearize.errors import UserError
from linearize.speculative import speculate
from linearize.swap import swapped

prompts = torch.randint(2, 97, (2, 25), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layers", ["LLL", "LSL"])
@pytest.mark.parametrize(("key", "pairs"), [("gdn", ["mixers"]), ("lolcats", ["mixers", "window"])])
def test_drafts_are_counted_and_change_nothing(converted: Any, key: str, pairs: list[str], layers: str) -> None:
    found = speculate(converted(key, layers), prompts, new_tokens=20, drafts=3)
    assert [(s.draft, s.target) for s in found] == [("mixers", "softmax"), ("window", "mixers")][: len(pairs)]
    for s in found:
        assert s.tokens == 40 and 0 <= s.accepted <= s.drafted and s.plain > 0 and s.assisted > 0 and s.same == 1.0


def test_a_perfect_draft_is_always_accepted(converted: Any) -> None:
    model = converted("lolcats")
    for attn in swapped(model).values():  # a linear branch that reads nothing: the window is the whole mixer
        attn.mixer.update.forward = lambda q, k, v, *a, **o: (
            v.new_zeros(*q.shape[:3], v.shape[-1]),
            v.new_zeros(q.shape[:3]),
            (),
        )
    (_, window) = speculate(model, prompts, new_tokens=20, drafts=4)
    assert window.acceptance == 1.0 and window.drafted == window.accepted == 32  # 4 of 5 tokens of each round


def test_a_model_without_mixers_is_refused(pico_model: Any) -> None:
    with pytest.raises(UserError, match="nothing to draft with"):
        speculate(pico_model(), prompts)
