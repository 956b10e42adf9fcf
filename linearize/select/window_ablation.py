"""Keeps the layers whose sight of distant tokens the model's predictions depend on, found without any training.

A linear layer that has learned nothing carries as much as a short softmax window. So every layer that is given up sees
the last `window` tokens alone, and the harm is

    D(S) = mean KL(source || windowed outside S) on text + the same on the answers of recall questions

over the whole vocabulary. Starting from all layers, each round gives up those of the remaining whose loss, beside the
layers lost before, does the least harm: half of the surplus, at least one. Text alone hardly notices a lost layer of
retrieval; the answers alone do not rank the others.

The idea that few layers or heads carry retrieval, and are found by ablation on synthetic recall, is that of
retrieval-aware distillation (2026, arXiv:2602.11374) for heads and of HALO (2026, arXiv:2601.22156) for layers, which
scores trained students; a windowed source in the place of a trained student, and elimination in rounds, are ours.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from linearize.arguments import by_name, positional
from linearize.data import PackedDataset, model_inputs
from linearize.errors import UserError
from linearize.evals.recall import WORDS, RecallItem, make_prompt
from linearize.evals.text import LOGIT_BUDGET, evaluating
from linearize.families.base import Family
from linearize.losses import divergence
from linearize.progress import bar
from linearize.schema import Count, Seed
from linearize.select.base import Choice, Round, Selector, SelectorConfig

LONGEST = 2048
"""Tokens of a row that are looked at where `seq_len` says nothing else."""
MARGIN = 128
"""Tokens of a row that facts, question and answer of a recall prompt take at most, per fact."""


class WindowAblationConfig(SelectorConfig):
    """Settings of the window_ablation selector."""

    type: Literal["window_ablation"] = "window_ablation"
    window: int = Field(64, gt=0, description="Last tokens that a layer sees which has been given up.")
    tokens: Count = Field(8192, gt=0, description="Tokens of training text on which harm is measured.")
    questions: int = Field(8, ge=0, description="Recall questions on which it is measured too.")
    facts: list[Annotated[int, Field(ge=1, le=len(WORDS))]] = Field(
        [1, 4], min_length=1, description="Facts in a question's text, of one after the other."
    )
    seq_len: Annotated[Count, Field(gt=0)] | None = Field(
        None, description="Tokens of text, or of a question's, at once. Default: data.seq_len, at most 2,048."
    )
    seed: Seed = Field(0, description="Seed of the questions.")


class WindowAblation(Selector):
    """See the module docstring."""

    Config = WindowAblationConfig
    config: WindowAblationConfig

    def candidates(self, config: Any) -> list[int]:
        """Layers that see more than the window."""
        reaches = {i: self.family.reach(config.get_text_config(), i) for i in super().candidates(config)}
        return [i for i, reach in reaches.items() if reach is None or reach > self.config.window]

    def length(self, seq_len: int) -> int:
        """Tokens that are looked at, of rows of `seq_len`."""
        return self.config.seq_len or min(seq_len, LONGEST)

    def check(self, config: Any, seq_len: int) -> None:
        super().check(config, seq_len)
        if not self.family.causal:
            raise UserError(
                "layers.type: window_ablation is for models that predict the next token, and "
                f"{self.family.__name__} models do not; give a pattern such as LLLS"
            )
        need = self.config.window + MARGIN * max(self.config.facts) if self.config.questions else self.config.window
        if self.length(seq_len) <= need:
            raise UserError(
                f"layers.type: window_ablation looks beyond a window of {self.config.window} tokens and needs rows of "
                f"more than {need} for that, got {self.length(seq_len)}; raise "
                f"{'layers.seq_len' if self.config.seq_len or seq_len > LONGEST else 'data.seq_len'}, or lower "
                f"layers.facts (each takes {MARGIN}) or layers.window"
            )

    def cost(self, config: Any, seq_len: int) -> str:
        """How often the model reads how much; the training text may turn out to be shorter."""
        wanted = self.config.count(config.get_text_config().num_hidden_layers)
        count, length = looks(len(self.candidates(config)), wanted), self.length(seq_len)
        text, asked = length * self._rows(length), self.config.questions
        often = f"{count:,} look{'s, each' if count != 1 else ''}"
        questions = f" and {asked:,} questions of about {length:,}" if asked else ""
        return f"{often} at {text:,} tokens of text{questions}, {count * (text + asked * length):,} tokens in all"

    def _rows(self, length: int) -> int:
        """Rows of text of that length that are looked at."""
        return max(1, self.config.tokens // length)

    def choose(self, model: Any, tokenizer: Any, data: PackedDataset) -> Choice:
        self.check(model.config, data.seq_len)
        wanted = self.config.count(model.config.get_text_config().num_hidden_layers)
        left = self.candidates(model.config)
        lost = [i for i in super().candidates(model.config) if i not in left]  # they see no further anyway
        rounds = []
        shown = bar("choosing layers", unit="look", total=looks(len(left), wanted))
        with evaluating(model), _masks_are_honoured(model), shown as counted:
            texts = self._texts(data)
            questions = self._questions(tokenizer, data)
            seen = [self._hidden(model, ids, asked) for ids, asked in texts + questions]
            while len(left) > wanted:
                scores = {}
                for layer in left:
                    with windowed(model, self.family, [*lost, layer], self.config.window):
                        harm = [self._harm(model, item, h) for item, h in zip(texts + questions, seen, strict=True)]
                    scores[layer] = sum(mean(part) for part in (harm[: len(texts)], harm[len(texts) :]) if part)
                    counted.update(1)
                least = sorted(left, key=lambda layer: scores[layer])[: _dropped(len(left) - wanted)]
                rounds.append(Round(scores, tuple(sorted(least))))
                lost += least
                left = [layer for layer in left if layer not in least]
        return Choice(tuple(left), tuple(rounds))

    def _texts(self, data: PackedDataset) -> list[Any]:
        """(inputs, positions that are compared) of a row each, the first of the training data."""
        length = self.length(data.seq_len)
        rows = [data.batch([i]) for i in range(min(len(data), self._rows(length)))]
        items = []
        for row in rows:
            inputs = {k: v[:, :length] for k, v in model_inputs(row).items()}
            mask = inputs.get("attention_mask")
            real = torch.ones(length, dtype=torch.bool) if mask is None else mask[0].bool()
            items.append((inputs, real[:-1].nonzero().flatten()))
        return items

    def _questions(self, tokenizer: Any, data: PackedDataset) -> list[Any]:
        rng, length = random.Random(self.config.seed), self.length(data.seq_len)
        if len(data) * data.seq_len < 2 * length:
            raise UserError(
                f"layers.type: window_ablation hides facts in {length:,} tokens of training text, and there are "
                f"{len(data) * data.seq_len:,}; give more text, or lower layers.seq_len"
            )
        count = min(len(data), -(-16 * length // data.seq_len))
        filler = torch.cat([data.batch([i])["input_ids"].flatten() for i in range(count)]).tolist()
        items = []
        for index in range(self.config.questions):
            facts = self.config.facts[index % len(self.config.facts)]
            item = make_prompt(tokenizer, filler, facts, length - MARGIN * facts, rng)
            items.append(_as_inputs(item))
        return items

    def _hidden(self, model: Any, inputs: dict[str, torch.Tensor], asked: torch.Tensor) -> torch.Tensor:
        given = {k: v.to(model.device) for k, v in inputs.items()}
        hidden = self.family.base_model(model)(**given, use_cache=False).last_hidden_state
        return hidden[0, asked.to(hidden.device)]

    def _harm(self, model: Any, item: Any, source: torch.Tensor) -> tuple[float, int]:
        """(summed KL, predictions)."""
        own = self._hidden(model, *item)
        step = max(1, LOGIT_BUDGET // model.config.get_text_config().vocab_size)
        pairs = zip(own.split(step), source.split(step), strict=True)
        kl = sum(
            float(divergence(self.family.logits(model, a), self.family.logits(model, b), "forward")) for a, b in pairs
        )
        return kl, len(own)


def mean(harm: list[tuple[float, int]]) -> float:
    """Nats per prediction."""
    return sum(kl for kl, _ in harm) / sum(n for _, n in harm)


def looks(left: int, wanted: int) -> int:
    """How often a model is looked at to choose `wanted` of `left` layers."""
    total = 0
    while left > wanted:
        total += left
        left -= _dropped(left - wanted)
    return total


def _dropped(surplus: int) -> int:
    return max(1, surplus // 2)


def _as_inputs(item: RecallItem) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The prompt with its answer, and the positions that predict the answer."""
    ids = torch.tensor([[*item.input_ids, *item.answer_ids]])
    return {"input_ids": ids}, torch.arange(len(item.input_ids) - 1, ids.shape[1] - 1)


@contextmanager
def windowed(model: nn.Module, family: type[Family], layers: Collection[int], window: int) -> Iterator[None]:
    """Inside the context these layers of an unconverted model see the last `window` tokens alone, the query included.

    Their attention gets a mask, which kernels of "eager" and "sdpa" honour.
    """
    hooks = []
    for index, attn in enumerate(family.attentions(model).values()):
        if index not in layers:
            continue
        names = positional(type(attn).forward)

        def narrow(module: nn.Module, args: tuple, kwargs: dict, names: Any = names) -> tuple[tuple, dict]:
            given = by_name(names, args, kwargs)
            x, mask = given["hidden_states"], given.get("attention_mask")
            place = torch.arange(x.shape[1], device=x.device)
            age = place[:, None] - place
            seen = ((age >= 0) & (age < window))[None, None]
            if mask is not None and mask.dtype == torch.bool:
                seen = seen & mask
            band = torch.zeros((), dtype=x.dtype, device=x.device).where(seen, torch.finfo(x.dtype).min)
            if mask is not None and mask.dtype != torch.bool:
                band = torch.minimum(band, mask)
            return (), {**given, "attention_mask": band}

        hooks.append(attn.register_forward_pre_hook(narrow, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _masks_are_honoured(model: Any) -> Iterator[None]:
    """Inside the context attention is computed by a kernel that takes any mask."""
    before = model.config._attn_implementation
    if before not in ("eager", "sdpa"):
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
