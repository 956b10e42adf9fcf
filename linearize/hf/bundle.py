"""Gathers the source code that a checkpoint needs to load with only torch and transformers installed.

`bundle(config)` follows imports from the modeling file, one family and the mixers in use, and
returns flat files: `linearize/ops/gla.py` becomes `ops_gla.py`, and its imports of other bundled modules
become relative. Nothing else in a file changes. Imports are found in the syntax tree, never by pattern.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from linearize import __version__, registry
from linearize.errors import UserError
from linearize.families.base import CONVERTED, Family
from linearize.mixers.base import config_from_dict
from linearize.mixers.parts.base import parts_of

ENTRY = "modeling_linearized"
"""The module that a checkpoint's `auto_map` names."""
ALLOWED = frozenset({"torch", "transformers", "huggingface_hub"}) | sys.stdlib_module_names
PACKAGE = __name__.partition(".")[0]

TEMPLATE = '''\
# Written by {package} {version} (Apache-2.0).
"""Loads this checkpoint: `{auto_class}.from_pretrained(folder, trust_remote_code=True)`."""

{imports}

CLASSES = {{{classes}}}


def find(package, key):
    return CLASSES[package, key]


{config_name}, {model_name} = build_classes({family}, find, __name__)
'''


def auto_map(model_type: str) -> dict[str, str]:
    """What `config.json` says about the bundled classes of converted models of this `model_type`."""
    family = _family(model_type)
    config_name, model_name = _class_names(family)
    return {"AutoConfig": f"{ENTRY}.{config_name}", family.auto_class: f"{ENTRY}.{model_name}"}


def bundle(config: Any) -> dict[str, str]:
    """Source files for a checkpoint with this configuration of a converted model.

    Returns:
        File name -> content, `modeling_linearized.py` among them.

    Raises:
        UserError: when a module that would be copied needs something besides the standard library, torch and
            transformers, or imports in a form that cannot be made flat.
    """
    family = _family(config.model_type)
    found = {place: cls for mixer in config.linearize["mixers"] for place, cls in _classes(mixer)}
    text_type = config.get_text_config().model_type
    if text_type != config.model_type and text_type in registry.keys("families"):
        found["families", text_type] = registry.find("families", text_type, Family)
    build = f"{PACKAGE}.hf.modeling"
    roots = [build, family.__module__, *(cls.__module__ for cls in found.values())]
    files = _walk(roots)
    imports = [
        f"from .{flat_name(family.__module__)} import {family.__name__}",
        f"from .{flat_name(build)} import build_classes",
    ]
    for i, cls in enumerate(found.values()):
        imports.append(f"from .{flat_name(cls.__module__)} import {cls.__name__} as Class{i}")
    config_name, model_name = _class_names(family)
    files[f"{ENTRY}.py"] = TEMPLATE.format(
        package=PACKAGE,
        version=__version__,
        imports="\n".join(imports),
        classes=", ".join(f"{place!r}: Class{i}" for i, place in enumerate(found)),
        config_name=config_name,
        model_name=model_name,
        family=family.__name__,
        auto_class=family.auto_class,
    )
    return files


def _classes(mixer: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], type]]:
    """((package, key), class) of a mixer and of all parts that its settings name."""

    cls: Any = registry.find_class("mixers", mixer["type"])
    yield ("mixers", mixer["type"]), cls
    config = config_from_dict(cls.Config, {k: v for k, v in mixer.items() if k != "type"}, registry.find_class)
    for package, settings in parts_of(config):
        yield (package, settings.type), type(settings).part


def flat_name(module: str) -> str:
    """File name without `.py` of a bundled module: `linearize.ops.gla` -> `ops_gla`, `my.gla` -> `my_gla`."""
    return module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def _family(model_type: str) -> type[Family]:
    """The family file of a source's or a converted model's `model_type`."""
    return registry.find("families", model_type.removeprefix(CONVERTED), Family)


def _class_names(family: type[Family]) -> tuple[str, str]:
    return f"Linearized{family.config_class.__name__}", f"Linearized{family.model_class.__name__}"


def _walk(roots: Sequence[str]) -> dict[str, str]:
    own = {root.partition(".")[0] for root in roots}
    modules: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        if module not in modules:
            modules[module], needed = _flatten(module, own)
            waiting += needed
    names = [flat_name(module) for module in modules]
    assert len(set(names)) == len(names), f"two bundled modules share a file name: {sorted(modules)}"
    return {f"{flat_name(module)}.py": text for module, text in sorted(modules.items())}


def _flatten(module: str, own: set[str]) -> tuple[str, list[str]]:
    """The module's text with flat imports, and the modules of `own` packages that it imports."""
    path, package = _locate(module)
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, filename=str(path))
    edits: list[tuple[ast.ImportFrom, str]] = []
    needed: list[str] = []
    for node, guarded in _imports(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                _check(module, alias.name, own, guarded, bare=True)
            continue
        source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        if source.partition(".")[0] not in own:
            _check(module, source, own, guarded, bare=False)
            continue
        for alias in node.names:
            if alias.name == "*" or _is_module(f"{source}.{alias.name}"):
                raise UserError(
                    f"{module} cannot be copied into a checkpoint: `from {source} import {alias.name}` does "
                    "not name a function or class; write `from package.module import name`"
                )
        needed.append(source)
        flat = ast.ImportFrom(module=flat_name(source), names=node.names, level=1)
        edits.append((node, ast.unparse(flat)))
    header = f"# Copied from {module} by {PACKAGE} {__version__}; only its imports are changed."
    if module.startswith(f"{PACKAGE}."):
        header += " Licence: Apache-2.0."
    return f"{header}\n{_replace(text, edits)}", needed


def _locate(module: str) -> tuple[Path, str]:
    """The source file of a module, and the package that its relative imports start from."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise UserError(f"{module} has no Python source file, so it cannot be copied into a checkpoint")
    return Path(spec.origin), spec.parent or ""


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a plain module
        return False


def _imports(tree: ast.AST, guarded: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement, and whether it may fail: transformers requires all those outside a `try`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, guarded
        elif not isinstance(node, ast.expr):  # most of a tree, and no import is in one
            yield from _imports(node, guarded or isinstance(node, ast.Try))


def _check(module: str, imported: str, own: set[str], guarded: bool, *, bare: bool) -> None:
    top = imported.partition(".")[0]
    if bare and top in own:
        raise UserError(
            f"{module} cannot be copied into a checkpoint: `import {imported}` has no flat form; "
            f"write `from {imported} import name`"
        )
    if top not in ALLOWED and not guarded:
        raise UserError(
            f"{module} cannot be copied into a checkpoint: it imports {imported!r}, and a checkpoint must "
            "load with only torch and transformers installed; import it in a `try` that has a fallback"
        )


def _replace(text: str, edits: list[tuple[ast.ImportFrom, str]]) -> str:
    lines = [line.encode() for line in text.splitlines(keepends=True)]  # the tree counts columns in bytes
    for node, new in sorted(edits, key=lambda edit: edit[0].lineno, reverse=True):
        assert node.end_lineno is not None
        first, last = node.lineno - 1, node.end_lineno - 1
        before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        lines[first : last + 1] = [before + new.encode() + after]
    return b"".join(lines).decode()
