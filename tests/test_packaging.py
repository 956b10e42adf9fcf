"""What an installation contains: every package, the demo assets, recipes as data, and the console script."""

import importlib.metadata
import json
import tomllib
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet
import pytest

from linearize import demo
from linearize.errors import UserError

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed():
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "linearize").rglob("*.py")}
    found = {".".join(folder.parts) for folder in folders} | {"linearize.cli", "linearize._recipes"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_console_script_is_installed_and_points_to_a_function():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="linearize")
    assert script.value == PROJECT["project"]["scripts"]["linearize"] == "linearize.cli.main:main"
    assert callable(script.load())


def test_recipes_are_found_as_package_data():
    def yamls(folder):
        for entry in folder.iterdir():
            yield from yamls(entry) if entry.is_dir() else [entry.name] * entry.name.endswith(".yaml")

    found = sorted(yamls(files("linearize._recipes")))
    assert found and found == sorted(p.name for p in (ROOT / "recipes").rglob("*.yaml"))


def test_nothing_named_cli_or_recipes_is_installed():
    top = importlib.metadata.distribution("linearize").read_text("top_level.txt")
    assert top.split() == ["linearize"]


def test_version_is_the_same_everywhere():
    import linearize

    assert importlib.metadata.version("linearize") == linearize.__version__
    assert PROJECT["project"]["dynamic"] == ["version"]


def test_demo_assets():
    assert json.loads((demo.model_path() / "config.json").read_text())["model_type"] == "llama"
    for split, rows, limit in (("train", 226, 2_000_000), ("dev", 31, 500_000)):
        path = demo.text_path(split)
        table = pyarrow.parquet.read_table(path)
        assert table.column_names == ["source", "title", "text"] and table.num_rows == rows
        assert path.stat().st_size <= limit
        assert min(map(len, table["text"].to_pylist())) >= 20_000
    train, dev = (set(pyarrow.parquet.read_table(demo.text_path(s))["title"].to_pylist()) for s in ("train", "dev"))
    assert not train & dev
    notice = (demo.model_path().parent / "NOTICE.md").read_text()
    assert all(title.removesuffix(".txt").removeprefix("osbooks-") in notice for title in train | dev)


def test_demo_split_aliases_and_unknown_split():
    assert demo.text_path("validation") == demo.text_path("dev") != demo.text_path("train")
    with pytest.raises(UserError, match="unknown split 'trian'.*did you mean 'train'"):
        demo.text_path("trian")
