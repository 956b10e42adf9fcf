"""Makes converted models known to transformers' own server, which knows only classes of transformers itself.

`transformers serve` looks in the module `transformers` for the class that a configuration names, and does not find that
of a checkpoint with code, whatever `--trust-remote-code` says (5.23.0). `expose(path)` puts it there.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from linearize.errors import UserError
from linearize.hf import auto
from linearize.hf.folder import ADAPTER
from linearize.hf.load import hub_file, load_config


def expose(path: str, *, trust_remote_code: bool = False) -> None:
    """Let `transformers` have the class of the converted model `path` as an attribute; other models need nothing.

    Raises:
        UserError: for a model that is missing or unreachable, and one with an adapter, which the server leaves out.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    if getattr(config, "linearize", None) is None:
        return
    name = f"{ADAPTER}/adapter_config.json"
    if (Path(path) / name).is_file() if Path(path).is_dir() else hub_file(path, name) is not None:
        raise UserError(f"{path} has a LoRA in {ADAPTER}/, which the server leaves out; convert with lora.merge: true")
    transformers = importlib.import_module("transformers")  # `import` may have bound the lazy module that this replaced
    for architecture in config.architectures or []:
        if not hasattr(transformers, architecture):
            setattr(transformers, architecture, getattr(auto, architecture))
