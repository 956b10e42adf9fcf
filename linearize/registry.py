"""Finds mixers, their parts, families and stages by name: the name of a file in their package is the key that users
type.

There is no list to edit. `module:Class` reaches a class outside the package; that is the only way a recipe can make
this toolkit import code, and it has to be written out. A checkpoint cannot: see `find`'s `trusted`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from linearize.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from linearize.families.base import Family

T = TypeVar("T")

SINGULAR = {"families": "family", "select": "selector", "evals.probes": "probe"}
"""What one item of a package is called in messages, where that is not its name less the s."""
PARTS = "mixers.parts."
"""What the packages of parts begin with."""


def keys(package: str) -> list[str]:
    """Names of the plug-in files in `linearize.<package>`, sorted; `base` and sub-packages are not plug-ins."""
    root = importlib.import_module(f"linearize.{package}")
    return sorted(m.name for m in pkgutil.iter_modules(root.__path__) if not m.ispkg and m.name != "base")


def find(package: str, key: str, base: type[T], *, trusted: bool = True) -> type[T]:
    """The subclass of `base` that `key` names: a file of `linearize.<package>`, or `module:Class`.

    Args:
        package: "mixers", "families", "stages", or a kind of parts such as "mixers.parts.decays".
        key: the name.
        base: what the class must derive from.
        trusted: whether the user wrote or vouched for `key`. False for names read from a checkpoint: they import no
            module from outside the package, and find only classes of modules that this program has imported itself.

    Raises:
        UserError: for an unknown key, a module that cannot be, or must not be, imported, or a class that is not a
            `base`.
    """
    if not isinstance(key, str):
        raise UserError(f"{_one(package)} must be a name, got {key!r}; known: {', '.join(keys(package))}")
    if ":" in key:
        if not all(part.isidentifier() for part in key.replace(":", ".", 1).split(".")):
            raise UserError(f"{_one(package)} {key!r} is not `module:Class`, names joined by dots and one colon")
        if not trusted and key.partition(":")[0] not in sys.modules:
            raise UserError(
                f"{_one(package)} {key!r} is code outside this toolkit, which was not imported because only the "
                "checkpoint asks for it; if you trust it, put its folder on the Python path and give "
                "--trust-remote-code, or trust_remote_code=True in Python"
            )
        return _outside(package, key, base)
    known = keys(package)
    if key not in known:
        remedy = "`module:Class` names your own"
        if package == "families":  # found by what a model is, so nobody types one
            remedy = "a new file in linearize/families adds an architecture (docs/adding_a_family.md); a checkpoint "
            remedy += "exported with export.native is no source, but the one that it was converted from is"
        raise UserError(f"unknown {_one(package)} {key!r}{did_you_mean(key, known)}; {remedy}")
    return _only_class(importlib.import_module(f"linearize.{package}.{key}"), base)


def family_of(config: Any) -> type[Family]:
    """The family of a model with this Hugging Face configuration, converted or not.

    Raises:
        UserError: when its `model_type`, or that of its language tower, has no family file.
    """
    base = importlib.import_module("linearize.families.base")
    return find("families", config.model_type.removeprefix(base.CONVERTED), base.Family).of(config, find_class)


def known_family(config: Any) -> type[Family] | None:
    """As `family_of`, and None for a model of an architecture that no file describes."""
    base = importlib.import_module("linearize.families.base")
    return family_of(config) if config.model_type.removeprefix(base.CONVERTED) in keys("families") else None


def find_class(package: str, key: str, *, trusted: bool = True) -> type:
    """The mixer ("mixers") or part of a mixer (such as "mixers.parts.decays") that `key` names; as `find`.

    What a part must derive from is the one class of that kind that its package's `base` module defines first.
    """
    if package == "mixers":
        return find(package, key, importlib.import_module("linearize.mixers.base").Mixer, trusted=trusted)
    bases = vars(importlib.import_module(f"linearize.{package}.base"))
    kind = "".join(word.title() for word in _one(package).split())
    return find(package, key, bases[kind], trusted=trusted)


def _one(package: str) -> str:
    return SINGULAR.get(package, package.removeprefix(PARTS).removesuffix("s").replace("_", " "))


def _only_class(module: ModuleType, base: type[T]) -> type[T]:
    found = [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, base) and cls.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one {base.__name__}, found {found}"
    return found[0]


def _outside(package: str, key: str, base: type[T]) -> type[T]:
    module_name, _, class_name = key.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"cannot import {module_name!r} for {_one(package)} {key!r}: {error}; "
            "install it, or add its folder to PYTHONPATH"
        ) from error
    cls = vars(module).get(class_name)  # not getattr: a lazy module would import more
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        raise UserError(
            f"{key!r} is not a {base.__name__} class; {module_name} must define a class {class_name!r} that derives "
            f"from {base.__module__}.{base.__name__}"
        )
    if "Config" in inspect.get_annotations(base) and not hasattr(cls, "Config"):
        raise UserError(
            f"{key!r} has no Config, the class of its settings, so it is a base of others; name one of those"
        )
    return cls
