"""Settings of the training data: the `data:` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from linearize.schema import Count, Seed, Strict


class DataConfig(Strict):
    """What to train on and how it is cut into sequences."""

    source: str = Field(
        "demo",
        description="demo (text inside the package), the name of a Hub dataset, or a .parquet, .jsonl, .json "
        "or .txt file, a folder of them, or a pattern such as texts/*.parquet. A .txt file is one document.",
    )
    name: str | None = Field(None, description="Configuration of the Hub dataset.")
    revision: str | None = Field(None, description="Commit or branch of the Hub dataset. Default: its newest.")
    split: str = Field(
        "train",
        description="Split, with an optional slice: train, train[:5%]. Of several local files each belongs "
        "to the split that its name contains as a word; the others, and a file named alone, belong to train.",
    )
    streaming: bool = Field(
        False,
        description="Read the Hub dataset while it arrives instead of downloading all of it first, and no more of it "
        "than the stages train on (where mixers are calibrated or layers chosen, at least 1M tokens), unless "
        "`max_tokens` is set. Text with recall documents is read so in any case.",
    )
    format: Literal["auto", "text", "chat", "instruction", "preference"] = Field(
        "auto",
        description="What a row is: text, a chat (list of messages, rendered by the tokenizer's chat "
        "template, or as `role: content` lines without one), an Alpaca instruction with its output, or a preference: a "
        "pair of replies, columns chosen and rejected, that are texts or lists of messages. auto decides by the "
        "columns among the first three. Pairs are padded, never packed, and their prompts never predicted.",
    )
    text_column: str | None = Field(
        None, description="Column with the text or the messages. Default: text, messages or conversations."
    )
    seq_len: Count = Field(1024, gt=1, le=2**24, description="Tokens per sequence.")
    packing: bool = Field(
        True, description="Concatenate documents to full sequences; false: one cut or padded document each."
    )
    eos_between_documents: bool = Field(True, description="End every document with the end-of-sequence token.")
    completion_only: bool = Field(
        False,
        description="Train on replies only: prompts of chats and instructions are not predicted, nor is what an "
        "assistant says before anybody else.",
    )
    limit_documents: Count | None = Field(None, gt=0, description="Use at most this many documents.")
    max_tokens: Count | None = Field(
        None, gt=0, description="Prepare at most this many tokens (at least one sequence), for example 20M."
    )
    shuffle: bool = Field(True, description="Shuffle documents before packing, and sequences in every epoch.")
    seed: Seed = Field(0, description="Seed of the document shuffle and of the synthetic recall documents.")
    recall_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of sequences that are synthetic recall documents, beside those that the text fills: 0.9 "
        "makes ten times as many. `max_tokens` counts both.",
    )

    @property
    def item_rows(self) -> int:
        """Rows that belong together: 2 where the data are pairs, else 1."""
        return 2 if self.format == "preference" else 1

    @model_validator(mode="after")
    def _pairs_are_of_their_own_kind(self) -> DataConfig:
        for key, value in (("recall_fraction", self.recall_fraction), ("text_column", self.text_column)):
            if self.format == "preference" and value:
                raise ValueError(f"format: preference reads pairs, for which {key}: {value} has no meaning; remove it")
        return self
