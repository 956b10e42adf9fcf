"""Show versions, devices, the backends that `auto` takes, and cache folders; put it into bug reports.

Nothing is sent anywhere unless --online asks for it, and tokens are never printed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

PACKAGES = (
    "linearize",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "lm_eval",
    "flash-linear-attention",
    "triton",
    "huggingface_hub",
)
TIMEOUT = 10
"""Seconds that `--online` waits for an answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--online", action="store_true", help="also try to reach the Hugging Face endpoint")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "backends": _backends(),
        "folders": _folders(),
    }
    sections["hub"] = _hub(arguments.online)
    for title, rows in sections.items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:<24}{value}")


def _versions() -> dict[str, str]:
    found = {"python": f"{platform.python_version()} on {platform.platform()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _devices() -> dict[str, str]:
    import torch

    rows = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows[f"cuda:{index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    return rows


def _backends() -> dict[str, str]:
    """What `auto` takes on each kind of device, and why the kernels cannot run where they cannot."""
    import torch

    from linearize.ops.backend import choose

    rows = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        sample = torch.empty(0, device=device)
        try:
            rows[f"auto on {device}"] = choose("doctor", "fla", sample)
        except ValueError as error:
            reason = str(error).partition("cannot be used: ")[2].partition(";")[0]
            rows[f"auto on {device}"] = f"torch ({reason})"
    return rows


def _folders() -> dict[str, str]:
    import datasets
    from huggingface_hub import constants
    from transformers.dynamic_module_utils import HF_MODULES_CACHE

    folders = {
        "models": constants.HF_HUB_CACHE,
        "datasets": datasets.config.HF_DATASETS_CACHE,
        "loaded code": HF_MODULES_CACHE,
        "prepared data": Path(constants.HF_HOME) / "linearize",
    }
    return {name: _free(Path(folder)) for name, folder in folders.items()}


def _free(folder: Path) -> str:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    state = "" if existing == folder else ", not there yet"
    return f"{folder} ({shutil.disk_usage(existing).free / 2**30:,.1f} GiB free{state})"


def _hub(online: bool) -> dict[str, str]:
    from huggingface_hub import constants, get_token

    from linearize.hub.online import endpoint

    rows = {
        "endpoint": endpoint(),
        "offline mode": "on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "off",
        "token": "none" if get_token() is None else "set",
    }
    if online:
        rows["reachable"] = _reach(constants.ENDPOINT)
    return rows


def _reach(endpoint: str) -> str:
    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=TIMEOUT):
            return "yes"
    except HTTPError as error:
        return f"yes (status {error.code})"
    except (URLError, TimeoutError) as error:
        return f"no: {error.reason if isinstance(error, URLError) else error}"
