"""Takes paths of the author's machine out of texts that are published: each becomes its last part.

`known_paths` gathers them from a recipe, where they say what was trained on; the home folder, and everybody's below
/home or /Users, is always taken for private. Names on the hub, and relative paths that lead down, remain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from linearize import plain_yaml

HOMES = (r"/(?:home|Users)/[^/\s\"'`<>|]+", r"[A-Za-z]:\\{1,2}Users\\{1,2}[^\\\s\"'`<>|]+")
"""Patterns of home folders, this one's beside them."""
LOCAL = re.compile(r"/|~|\.{1,2}/|[A-Za-z]:[\\/]|\\\\")
"""What a path begins with that leads out of a checkpoint's folder."""
REST = r"(?:[\\/][^\s\"'`,;:()\[\]{}<>|]*)?"
"""What may follow a folder: the path of something in it."""
FENCE = re.compile(r"(?<=^```yaml\n).*?(?=^```)", re.DOTALL | re.MULTILINE)
"""A block of YAML in a model card."""


def known_paths(data: Any) -> Iterator[str]:
    """All texts in plain data that are paths of some machine, such as a recipe's `model.name` or `data.source`."""
    if isinstance(data, str):
        if LOCAL.match(data) and _last(data):
            yield data
    elif isinstance(data, Mapping | list):
        for value in data.values() if isinstance(data, Mapping) else data:
            yield from known_paths(value)


class Hider:
    """Replaces paths by their last parts.

    Args:
        known: paths to replace, beside those of home folders.
        home: of the user; the process's own by default.
    """

    def __init__(self, known: Iterable[str], home: Path | None = None):
        own = str(home or Path.home())
        homes = [*HOMES, *([re.escape(own)] if len(Path(own).parts) > 1 else [])]
        self.home = re.compile("|".join(homes))
        listed = sorted({path.rstrip("/\\") for path in known}, key=len, reverse=True)
        # A path is found in JSON and YAML, where lines may break at a space and a backslash is doubled.
        written = [re.escape(path).replace(r"\ ", r"\s+").replace(r"\\", r"\\{1,2}") for path in listed]
        self.path = re.compile(rf"(?<![\w.~-])(?:{'|'.join([*written, *homes])}){REST}(?![\w-])")

    def text(self, text: str) -> str:
        """A plain text."""
        return self.path.sub(self._shown, text)

    def yaml(self, text: str) -> str:
        """A YAML document; its comments stay where its paths are written plainly."""
        return self._structured(text, plain_yaml.read, plain_yaml.write)

    def json(self, text: str) -> str:
        """A JSON document."""
        return self._structured(text, json.loads, lambda data: json.dumps(data, indent=2, ensure_ascii=False) + "\n")

    def card(self, text: str) -> str:
        """A model card, with the recipe in it."""
        return self.text(FENCE.sub(lambda found: self.yaml(found[0]), text))

    def _structured(self, text: str, read: Callable[[str], Any], write: Callable[[Any], str]) -> str:
        try:
            data = read(text)
        except (yaml.YAMLError, ValueError):
            return self.text(text)
        hidden, simple = self._data(data), self.text(text)
        if hidden == data:
            return text
        try:
            same = read(simple) == hidden
        except (yaml.YAMLError, ValueError):
            same = False
        return simple if same else write(hidden)  # a path was written with escapes

    def _data(self, data: Any) -> Any:
        if isinstance(data, str):
            return self.text(data)
        if isinstance(data, dict):
            return {self._data(key): self._data(value) for key, value in data.items()}
        return [self._data(value) for value in data] if isinstance(data, list) else data

    def _shown(self, found: re.Match[str]) -> str:
        path = found[0].rstrip("/\\.") if found[0].endswith(("/.", "\\.")) else found[0]
        return "~" if self.home.fullmatch(path.rstrip("/\\")) else _last(path) or "~"


def _last(path: str) -> str:
    """The last part of a path of any system; empty for `/`, `~` and the like."""
    last = re.split(r"[\\/]+", path.rstrip("/\\"))[-1]
    return "" if last in (".", "..", "~") or last.endswith(":") else re.sub(r"\s+", " ", last)
