"""The held-out text of an evaluation: where it comes from, its tokens, and whether they are enough for what is asked.

All of it is known before any weight is there: `check_evaluation` needs the settings alone, `eval_tokens` and
`check_text` the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from linearize.data import DataConfig, check_source, tokens_of
from linearize.errors import UserError, local_path
from linearize.evals.config import EvalConfig
from linearize.evals.probes.base import probe_of

TEXT_TOKENS = 2_000_000
"""Tokens of evaluation text that are read at most; windows are spread over them."""


def eval_tokens(config: EvalConfig, tokenizer: Any, data: DataConfig | None = None) -> torch.Tensor:
    """Token ids [N] of the held-out text, at most `TEXT_TOKENS`; every document ends with end-of-sequence.

    Args:
        config: names the text and its split; a single file is read whole, whatever the split.
        data: the training data, whose source is the default; the demo text when None.

    Raises:
        UserError: when the text cannot be read, or the training source has no such split.
    """
    with _no_text(config, data):
        return tokens_of(held_out(config, data), tokenizer, max_tokens=TEXT_TOKENS)


def check_evaluation(config: EvalConfig, data: DataConfig | None = None) -> None:
    """Raise the errors of `eval_tokens` and of probes that can be known before a model is there."""
    for probe in config.probes:
        probe_of(probe).check()
    with _no_text(config, data):
        check_source(held_out(config, data))


def held_out(config: EvalConfig, data: DataConfig | None) -> DataConfig:
    """Where the held-out text comes from, for the arguments of `eval_tokens`."""
    if config.text is None and data is not None:
        return data.model_copy(update={"split": config.split})
    source = config.text or "demo"
    return DataConfig(source=source, split="train" if local_path(source).is_file() else config.split)


def check_text(config: EvalConfig, data: DataConfig | None, lengths: Sequence[int], tokens: int) -> None:
    """Raise a UserError where a text of `tokens` tokens has no window of one of `lengths`, or as a probe's settings ask
    for; it names the text.
    """
    told = _named(config, data, tokens)
    if (longest := max(lengths)) > tokens:
        raise UserError(
            f"lengths: {told}, fewer than one window of {longest:,}; choose shorter lengths or a longer text"
        )
    for settings in config.probes:
        probe_of(settings).check_text(tokens, told)


def _named(config: EvalConfig, data: DataConfig | None, tokens: int) -> str:
    """What is said of a text that is too short."""
    text, read = held_out(config, data), " that are read" if tokens == TEXT_TOKENS else ""
    split = "" if local_path(text.source).is_file() else f", split {text.split},"
    return f"the evaluation text {text.source}{split} has {tokens:,} tokens{read}"


@contextmanager
def _no_text(config: EvalConfig, data: DataConfig | None) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if config.text is not None:
            raise UserError(f"evaluation.text: {error}") from error
        raise UserError(
            f"no evaluation text: {error}. Set evaluation.text to a held-out file or to demo, or evaluation.split to a "
            "split that the source has"
        ) from error
