"""Shared fixtures: a hub on this machine, and a checkpoint to push to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint import CARD
from loopback import TOKEN, Hub

from linearize.hf.export import export


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as server:
        yield server


@pytest.fixture
def student(converted: Any) -> Any:
    return converted("lolcats", "LSL")


@pytest.fixture
def folder(student: Any, pico_tokenizer: Any, tmp_path: Path) -> Path:
    """A checkpoint in several files, and around it what must not be published."""
    files = {"README.md": CARD, "recipe.yaml": "model: {name: pico}\n"}
    out = export(student, pico_tokenizer, tmp_path / "student", max_shard_size="20KB", extra_files=files)
    for private in (
        "run/0-finetune/optimizer.pt",
        ".env",
        ".git/config",
        "token",
        "pytorch_model.bin",
        "own.py",
        "n.txt",
    ):
        (out / private).parent.mkdir(parents=True, exist_ok=True)
        (out / private).write_text(f"secret {TOKEN}")
    return out


@pytest.fixture
def here(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub that this very process knows, with a token, and without waiting between attempts."""
    from huggingface_hub import constants

    known: dict[str, Any] = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }
    for name, value in known.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return server
