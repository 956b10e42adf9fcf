"""YAML as recipes have it: scalars of the core schema of YAML 1.2, and no key twice.

PyYAML reads YAML 1.1, in which `1:30` is 90, `no` is false, `010` is 8, `2024-01-01` a date and `1e-4` a text. Here the
first two and the date are texts, `010` is 10, and `1e-4` a number (https://yaml.org/spec/1.2.2/#103-core-schema). What
is written is read the same by both.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_DIGITS = list("0123456789")
CORE: dict[str, tuple[str, list[str]]] = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", ["-", "+", *_DIGITS]),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        ["-", "+", ".", *_DIGITS],
    ),
}
"""Type -> pattern of its plain scalars, and what these begin with."""


class _Loader(yaml.SafeLoader):
    """Reads plain data, and no mapping that has a key twice, of which yaml would take the last."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in seen:
                raise yaml.YAMLError(f"key {key.value!r} is there twice, in lines {seen[name]} and {line}; remove one")
            seen[name] = line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either version of YAML would take for something else."""


for _type, (_pattern, _first) in CORE.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_type}", re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_implicit_resolver(f"{_TAG}merge", re.compile(r"<<\Z"), ["<"])
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)


def read(text: str) -> Any:
    """The plain data that `text` holds.

    Raises:
        yaml.YAMLError: for a text that is no YAML, holds more than plain data, or has a key twice.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (ValueError, KeyError, AttributeError) as error:  # of a value with an explicit tag, such as !!int x
        raise yaml.YAMLError(f"a value does not fit its tag: {error}") from error
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error


def write(data: Any) -> str:
    """Plain data as YAML, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


def write_line(data: Any) -> str:
    """Plain data as YAML in a single line, keys in their order: `{ce: 0.9, train: [all]}`."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=float("inf")).strip()
