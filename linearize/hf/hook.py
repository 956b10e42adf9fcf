"""Lets the Auto classes of transformers find converted models once `linearize` is imported, at no cost.

`install()` imports neither torch nor transformers. Registration waits for the first
`AutoConfig.from_pretrained`, which every Auto class goes through: any earlier and it could meet transformers
half imported.
"""

from __future__ import annotations

import functools
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TARGET = "transformers.models.auto.configuration_auto"


def install() -> None:
    """Patch `AutoConfig` now if it is loaded, else when it is."""
    if TARGET in sys.modules:
        _patch(sys.modules[TARGET])
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Runs `_patch` on the target module once it has been executed; answers for no other module."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TARGET:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch(module: ModuleType) -> None:
    auto_config = getattr(module, "AutoConfig", None)
    if auto_config is None:
        return
    original = auto_config.from_pretrained.__func__
    if hasattr(original, "__wrapped__") and original.__module__ == __name__:
        return

    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        from linearize.hf.auto import register

        register()
        return original(cls, *args, **kwargs)

    auto_config.from_pretrained = classmethod(from_pretrained)
