"""Sections of a recipe that have no module of their own: `model`, `kept` and `export`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator
from transformers import AttentionInterface

from linearize.errors import did_you_mean
from linearize.schema import Count, Strict


class ModelConfig(Strict):
    """The source model."""

    name: str = Field(description="Alias, hub name, local folder, or `demo` for the teacher inside the package.")
    revision: str | None = Field(None, description="Hub revision.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type the weights are loaded and exported in; auto keeps the source's."
    )
    attn_implementation: str | None = Field(
        None,
        description="Attention kernel of the softmax layers, as transformers names it; null takes one that computes "
        "what the model asks for.",
    )
    trust_remote_code: bool = Field(False, description="Run code that the source repository contains.")
    device: str = Field("auto", description="auto takes a GPU when there is one.")

    @field_validator("attn_implementation")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        known = ["eager", *AttentionInterface().valid_keys()]
        if value is not None and value not in known and "/" not in value:  # a/b is a kernel of the hub
            raise ValueError(f"unknown attention kernel, got {value!r}{did_you_mean(value, known)}")
        return value


class KeptConfig(Strict):
    """How the layers that keep their softmax attention see positions; by default as in the source."""

    rope: bool = Field(True, description="Whether they rotate queries and keys; false leaves order to the mixers.")
    log_scale: Annotated[Count, Field(gt=1)] | None = Field(
        None,
        description="Tokens L, such as `data.seq_len`, beyond which the logits of token t (from 1) are multiplied by "
        "log t / log L; null for never.",
    )


class ExportConfig(Strict):
    """How the result is written."""

    max_shard_size: str = Field(
        "5GB", pattern=r"^[1-9][0-9]* ?[KMGT]B$", description="Largest safetensors file, such as 500MB or 5GB."
    )
    native: bool = Field(
        False,
        description="Write the architecture of transformers that the converted model is exactly, which loads without "
        "remote code; an error where it is none.",
    )
