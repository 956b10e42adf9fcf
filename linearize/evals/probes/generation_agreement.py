"""How long a student writes the same as its teacher, word for word, from the same beginning of held-out text.

Both continue greedily through their caches; one token that differs and the texts part for good, so the length of the
common beginning is the strictest measure of likeness, and its survival curve says how many prompts last how long.
Beside it stands the milder one: how often the student would write the next token of the teacher's text, given that text
so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field, PositiveInt

from linearize.evals.probes.base import DoesNotFit, Probe, ProbeConfig, Rows, Subject
from linearize.evals.recall import alike
from linearize.evals.recall_score import generate_greedily, padding_id
from linearize.evals.statistics import wilson
from linearize.evals.views import Lines, Table, View
from linearize.progress import advance
from linearize.schema import Count


class GenerationAgreementConfig(ProbeConfig):
    """Settings."""

    prompts: PositiveInt = Field(32, description="Prompts, evenly spaced over the text.")
    prompt_tokens: Count | None = Field(
        None, gt=0, description="Tokens of a prompt. Default: half the training length, at most 128."
    )
    tokens: PositiveInt = Field(64, description="Tokens that each model writes.")


class GenerationAgreement(Probe):
    """A text that ends counts up to its end-of-text token, and as the same for all `tokens` if the other is it too."""

    Config = GenerationAgreementConfig
    needs_teacher = True

    unit = "prompts"

    def rows(self, seq_len: int) -> Rows:
        """The prompts with what follows."""
        return [(self.config.prompts, self._prompt(seq_len) + self.config.tokens)]

    def _prompt(self, seq_len: int) -> int:
        """Tokens of a prompt."""
        return self.config.prompt_tokens or max(1, min(seq_len // 2, 128))

    def run(self, subject: Subject) -> dict[str, Any]:
        """`{"prompts", "prompt_tokens", "tokens", "identical", "low", "high", "common_prefix", "survival", "forced",
        "forced_curve", "forced_tokens"}`: the share of prompts with the same continuation and its 95% Wilson interval,
        the mean tokens written before the first that differs, `[[n, share of prompts that are the same for n tokens]]`;
        the share of the teacher's tokens that the student finds likeliest after the teacher's text, `[[end, share]]`
        for buckets of them, and how many they are.

        Raises:
            DoesNotFit: when prompt and continuation do not fit the model.
        """
        config = self.config
        assert subject.teacher is not None
        prompt = self._prompt(subject.seq_len)
        room, _ = subject.fitting(prompt + config.tokens)
        if room < prompt + config.tokens:
            raise DoesNotFit(
                f"generation_agreement needs {prompt} tokens of prompt and {config.tokens} more, and the text "
                f"or the model has {room}; set prompt_tokens or tokens lower"
            )
        pad, ends = padding_id(subject.tokenizer), _ends(subject.model)
        lengths: list[int] = []
        right, asked = torch.zeros(config.tokens), torch.zeros(config.tokens)
        for ids in subject.batches(prompt, config.prompts):
            rows, how = ids.tolist(), {"tokens": config.tokens, "pad": pad}
            with subject.teacher() as teacher:
                expected = [_cut(text, ends) for text in generate_greedily(teacher, rows, **how)]
            found = [_cut(text, ends) for text in generate_greedily(subject.model, rows, **how)]
            lengths += [_common(a, b, config.tokens) for a, b in zip(expected, found, strict=True)]
            same = _forced(subject.model, ids, expected, pad)  # one tensor of hits for each row
            for hits in same:
                right[: len(hits)] += hits.float()
                asked[: len(hits)] += 1
            advance(len(ids) * config.tokens)
        whole = sum(length == config.tokens for length in lengths)
        low, high = wilson(whole, len(lengths))
        return {
            "prompts": len(lengths),
            "prompt_tokens": prompt,
            "tokens": config.tokens,
            "identical": whole / len(lengths),
            "low": low,
            "high": high,
            "common_prefix": sum(lengths) / len(lengths),
            "survival": [
                [n, sum(length >= n for length in lengths) / len(lengths)] for n in range(1, config.tokens + 1)
            ],
            "forced": float(right.sum() / asked.sum()),
            "forced_curve": [
                [b, float(right[a:b].sum() / asked[a:b].sum())]
                for a, b in pairwise(_edges(config.tokens))
                if asked[a:b].sum()
            ],
            "forced_tokens": int(asked.sum()),
        }

    @classmethod
    def views(cls, results: Mapping[str, dict[str, Any]]) -> Sequence[View]:
        """The survival curve, agreement after the teacher's text, and a table."""

        def points(key: str) -> dict[str, list[tuple[float, float]]]:
            return {name: [(n, share) for n, share in found[key]] for name, found in results.items()}

        columns = ["", "prompts", "identical", "95% interval", "common beginning (tokens)", "next token as teacher's"]
        rows: list[list[str | float | None]] = [
            [
                name,
                str(found["prompts"]),
                found["identical"],
                f"{found['low']:.2f} to {found['high']:.2f}",
                found["common_prefix"],
                found["forced"],
            ]
            for name, found in results.items()
        ]
        return [
            Lines(
                "Continuations that are still the teacher's",
                "Both write greedily; after the first token that differs a prompt is lost.",
                x_label="tokens written",
                y_label="share of prompts",
                series=points("survival"),
            ),
            Lines(
                "Next token as the teacher's, after the teacher's text",
                x_label="token of the continuation (up to)",
                y_label="share of tokens",
                series=points("forced_curve"),
            ),
            Table("Agreement in generation", columns=columns, rows=rows),
        ]


def _forced(model: Any, prompts: torch.Tensor, texts: list[list[int]], pad: int) -> list[torch.Tensor]:
    """For each row whether the student's likeliest token is the next of the teacher's text: prompts [B, P] -> [n] each.

    Texts that ended earlier are filled behind their end, where nothing is read.
    """
    longest, first = max(map(len, texts)), prompts.shape[1]
    wide = torch.tensor([text + [pad] * (longest - len(text)) for text in texts], device=prompts.device)
    logits = model(input_ids=torch.cat([prompts, wide], dim=1), use_cache=False).logits
    hits = (logits[:, first - 1 : -1].argmax(-1) == wide).cpu()
    return [hits[row, : len(text)] for row, text in enumerate(texts)]


def _ends(model: Any) -> set[int]:
    """Tokens at which the model's `generate` stops."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list | tuple) else {ends}


def _cut(text: list[int], ends: set[int]) -> list[int]:
    """The text up to its first end-of-text token, which it keeps."""
    end = next((i for i, token in enumerate(text) if token in ends), len(text))
    return text[: end + 1]


def _common(a: list[int], b: list[int], tokens: int) -> int:
    """Length of the common beginning; all `tokens` for texts that are the same and have ended."""
    return tokens if a == b else alike(a, b)


def _edges(tokens: int) -> list[int]:
    """0, 8, 16, ... and `tokens`."""
    return [*range(0, tokens, 8), tokens]
