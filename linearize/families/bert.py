"""BERT: an encoder, whose queries see tokens on both sides; positions at the input; attention returns heads, which the
next module projects.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertSelfAttention

from linearize.families.base import Family, Heads


class Bert(Family):
    """`model_type: bert`, without a head: sentence embeddings and the like."""

    model_class = BertModel
    config_class = BertConfig
    attention_class = BertSelfAttention
    auto_class = "AutoModel"
    causal = False
    base = ""
    attention = "encoder.layer.{}.attention.self"
    lora_targets = {"q": "query", "k": "key", "v": "value"}

    @classmethod
    def project(cls, attn: Any, x: torch.Tensor) -> Heads:
        heads = (*x.shape[:2], -1, attn.attention_head_size)
        return attn.query(x).view(heads), attn.key(x).view(heads), attn.value(x).view(heads)

    @classmethod
    def query_module(cls, attn: Any) -> nn.Module:
        return attn.query

    @classmethod
    def output_projection(cls, attn: Any) -> None:
        return None

    @classmethod
    def dropout(cls, config: Any) -> float:
        return config.attention_probs_dropout_prob
