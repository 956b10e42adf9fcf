"""The embedded default: a small trained teacher and some text, so that `--model demo` runs offline.

`NOTICE.md` beside this file names the sources and licences of both.
"""

from __future__ import annotations

from pathlib import Path

from linearize.errors import UserError, did_you_mean

_HERE = Path(__file__).resolve().parent
SPLITS = {"train": "train", "dev": "dev", "validation": "dev", "test": "dev"}


def model_path() -> Path:
    """Folder of the demo teacher: a Llama of 5.5M parameters with its tokenizer, loadable by transformers."""
    return _HERE / "model"


def text_path(split: str) -> Path:
    """Parquet file (columns source, title, text) of `split`: "train", or "dev" (also "validation", "test").

    Raises `UserError` for any other split.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of the demo text{did_you_mean(split, SPLITS)}")
    return _HERE / "text" / f"{SPLITS[split]}.parquet"
