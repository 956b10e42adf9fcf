"""The bundler copies the import graph, changes imports alone, and refuses what could not load elsewhere."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from linearize import registry
from linearize.errors import UserError
from linearize.hf.auto import classes
from linearize.hf.bundle import auto_map, bundle

PREAMBLE = "from linearize.mixers.hedgehog import Hedgehog, HedgehogConfig\n"
CLASS = "\n\nclass Mine(Hedgehog):\n    Config = HedgehogConfig\n"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    names = iter(range(100))

    def make(code: str) -> str:
        module = f"bundle_case_{tmp_path.name.replace('-', '_')}_{next(names)}"
        (tmp_path / f"{module}.py").write_text(PREAMBLE + code + CLASS)
        monkeypatch.syspath_prepend(str(tmp_path))
        return f"{module}:Mine"

    return make


def files_of(mixer: str, family: str = "llama") -> dict[str, str]:
    """The files of a checkpoint of that family with that mixer."""
    return bundle(classes(family)[0](linearize={"mixers": [{"type": mixer}], "layers": [0]}))


@cache
def imports(name: str, text: str) -> list[ast.ImportFrom | ast.Import]:
    """The import statements of a file; most checkpoints share most of theirs."""
    return [node for node in ast.walk(ast.parse(text, name)) if isinstance(node, ast.ImportFrom | ast.Import)]


@pytest.mark.parametrize("family", registry.keys("families"))
@pytest.mark.parametrize("mixer", registry.keys("mixers"))
def test_every_relative_import_is_there_and_flat(family: str, mixer: str) -> None:
    files = files_of(mixer, family)
    for name, text in files.items():
        for node in imports(name, text):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in files, f"{name}: {ast.unparse(node)}"
            else:
                assert "linearize" not in ast.unparse(node), name
    for reference in auto_map(family).values():
        module, _, cls = reference.partition(".")
        assert cls in files[f"{module}.py"]


def test_only_what_is_used_is_copied() -> None:
    files = files_of("liger")
    assert "mixers_liger.py" in files and "mixers_lolcats.py" not in files
    others = {f"families_{key}.py" for key in registry.keys("families") if key != "llama"}
    assert not others & set(files)


def test_only_import_statements_change(mine: Callable[[str], str]) -> None:
    quoted = '"""from linearize.swap import swapped"""'
    code = f'{quoted}\nβ = 1; from linearize.swap import (\n    swapped,  # why\n); γ = "é"'
    key = mine(code)
    text = files_of(key)[f"{key.partition(':')[0]}.py"]
    header, first, *rest = text.splitlines()
    assert header.startswith("# Copied from bundle_case_") and "Licence" not in header
    assert first == "from .mixers_hedgehog import Hedgehog, HedgehogConfig"
    assert rest[:2] == [quoted, 'β = 1; from .swap import swapped; γ = "é"']


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import pydantic", "it imports 'pydantic', and a checkpoint must load with only torch"),
        ("def f():\n    from fla.ops import gla", "it imports 'fla.ops'"),
        ("import linearize.swap", "`import linearize.swap` has no flat form"),
        ("from linearize import swap", "`from linearize import swap` does not name a function or class"),
        ("from linearize.swap import *", r"`from linearize.swap import \*` does not name"),
    ],
)
def test_code_that_could_not_load_is_refused_by_name(mine: Callable[[str], str], code: str, message: str) -> None:
    key = mine(code)
    module = key.partition(":")[0]
    with pytest.raises(UserError, match=f"^{module} cannot be copied into a checkpoint: .*{message}"):
        files_of(key)


def test_a_guarded_import_is_allowed(mine: Callable[[str], str]) -> None:
    key = mine("try:\n    import fla\nexcept ImportError:\n    fla = None")
    assert f"{key.partition(':')[0]}.py" in files_of(key)
