"""Which names of devices are refused, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainable import make_recipe

from linearize.device import default_device
from linearize.errors import UserError
from linearize.pipeline import convert


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "unknown device 'tpu'; known: auto, cpu, cuda"),
        ("meta", "device 'meta' holds no values, so nothing runs there; take auto, cpu or cuda"),
        ("vulkan", r"device 'vulkan' cannot be used here \(.{0,120}\); take auto or cpu"),
        ("hpu", r"device 'hpu' cannot be used here \(.{0,120}\); take auto or cpu"),
    ],
)
def test_devices_that_nothing_runs_on(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        default_device(name)


def test_the_cpu_and_a_gpu_beyond_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"device 'cuda:99' cannot be used here \("):
        default_device("cuda:99")


def test_a_conversion_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    model: dict[str, Any] = {"name": str(source / "source"), "device": "meta"}
    with pytest.raises(UserError, match="device 'meta'"):
        convert(make_recipe(source, model=model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
