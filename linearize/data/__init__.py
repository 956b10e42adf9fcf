"""Training data: documents of any source, tokenised once into packed rows on disk, and batches by step number."""

from linearize.data.check import check_source
from linearize.data.config import DataConfig
from linearize.data.dataset import prepare, read_tokens, tokens_of
from linearize.data.packed import PackedDataset, Rows, batches, model_inputs, predicted, visited
from linearize.data.packing import pack, pad_each

__all__ = [
    "DataConfig",
    "PackedDataset",
    "Rows",
    "batches",
    "check_source",
    "model_inputs",
    "pack",
    "pad_each",
    "predicted",
    "prepare",
    "read_tokens",
    "tokens_of",
    "visited",
]
