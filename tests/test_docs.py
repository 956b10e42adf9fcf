"""The documentation is true: generated pages are fresh, commands parse, examples run, links work.

The mixer of docs/adding_a_mixer.md is written to a module and used as a reader would use it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from linearize.cli.main import Parser
from linearize.errors import UserError
from linearize.plan import make_plan
from linearize.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if re.match(r"(PYTHONPATH=\S+ )?linearize ", line)
]


def test_the_recipe_reference_is_fresh() -> None:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec and spec.loader
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert build.PAGE.read_text() == build.render(), "docs/recipes.md is stale: run `make docs`"


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_in_the_documentation_parse(page: str, line: str, decay: Any) -> None:
    name, *arguments = shlex.split(line, comments=True)[1 + line.startswith("PYTHONPATH") :]
    command = importlib.import_module(f"linearize.cli.{name}")
    parser = Parser(prog=name, allow_abbrev=False)
    command.add_arguments(parser)
    parsed = parser.parse_intermixed_args(arguments)
    if name in ("convert", "plan"):
        recipe = Recipe.load(parsed.recipe, parsed.model, parsed.overrides)
        assert recipe.stages


def test_the_parsing_test_can_fail() -> None:
    assert len(COMMANDS) > 15
    with pytest.raises(UserError, match="unrecognized arguments"):
        test_commands_in_the_documentation_parse("", "linearize plan --model demo --dry-run", None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_length(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.fixture
def decay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The mixer of docs/adding_a_mixer.md, as the module `my_mixers`."""
    code = blocks(ROOT / "docs" / "adding_a_mixer.md", "python")[0]
    (tmp_path / "my_mixers.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(importlib.sys.modules, "my_mixers", raising=False)  # type: ignore[attr-defined]
    return importlib.import_module("my_mixers")


def test_the_example_mixer_keeps_the_contract(decay: Any) -> None:
    _, check = blocks(ROOT / "docs" / "adding_a_mixer.md", "python")
    exec(compile(check, "adding_a_mixer.md", "exec"), {})


def test_the_example_mixer_converts_and_generates(decay: Any, pico_model: Any) -> None:
    import torch

    from linearize.pipeline import swap

    (settings,) = blocks(ROOT / "docs" / "adding_a_mixer.md", "yaml")
    mixer = yaml.safe_load(settings)["mixer"]
    recipe = Recipe.load("lolcats", "demo", [f"mixer={mixer}", "layers=LSL", "model.dtype=float32"])
    model = pico_model()
    plan = make_plan(recipe, model.config)
    assert plan.new_parameters == 2 * (32 * 4 + 4) and plan.mixer["first_decay"] == 0.98
    swap(model, plan, seed=0)
    ids = torch.arange(2, 22)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
    with pytest.raises(UserError, match=r"unknown key 'mixer.frst_decay'; did you mean 'first_decay'"):
        Recipe.load("lolcats", "demo", ['mixer={type: "my_mixers:Decay", frst_decay: 1}'])


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_python_examples_use_names_that_exist(page: str) -> None:
    import linearize

    code = "\n".join(blocks(ROOT / page, "python"))
    compile(code, page, "exec")
    used = set(re.findall(r"linearize\.(\w+)", code))
    assert used and used <= set(linearize.__all__)
