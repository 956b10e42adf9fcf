"""The documentation is true: generated pages are fresh, commands parse, examples run, links work.

The mixer and the part of docs/adding_a_mixer.md are written to modules and used as a reader would use them; so is the
recipe of docs/mixers.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import test_families
import torch
import yaml
from ops.op_cases import CASES
from trainable import metrics

from linearize.cli.main import Parser
from linearize.errors import UserError
from linearize.mixers.base import HeadShape, Mixer, config_from_dict
from linearize.mixers.parts.base import Calibration, Part
from linearize.pipeline import convert, swap
from linearize.plan import make_plan
from linearize.preflight import plan_of
from linearize.recipe import Recipe
from linearize.recipe_files import available
from linearize.registry import find, keys
from linearize.testing import check_mixer

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "docs" / "quickstart.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


AT_2048 = ["auto", "auto-temperature-1", "auto-temperature-1.16", "auto-64", "auto-10m"]
AT_2048 += ["named", "named-40m", "named-40m-6e-4", "40m-12e-4", "40m-24e-4"]
RESULTS = ["lolcats", "liger", "catalogue", *AT_2048]
ALONE = [f"teacher-30m-{name}" for name in AT_2048]
"""Results of which the page shows one length with the linear branch off."""
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if re.match(r"(PYTHONPATH=\S+ )?linearize ", line)
]


def script(name: str) -> Any:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_reference_is_fresh() -> None:
    build = script("build")
    assert build.PAGE.read_text() == build.render(), "docs/recipes.md is stale: run `make docs`"


def test_the_tables_of_mixers_are_fresh_and_complete() -> None:
    build = script("build_mixers")
    page = build.PAGE.read_text()
    assert page == build.render(page), "docs/mixers.md is stale: run `make docs`"
    for key in keys("mixers"):
        if key == "composed":
            continue
        assert page.count(f"| `{key}` |") >= 3  # catalogue, parts, states
        assert {f"demo/{key}", f"default/{key}"} <= available().keys()
        paper, what, trap = build.story(find("mixers", key, Mixer))
        assert "arxiv.org" in paper, f"the docstring of {key}.py names no arXiv id"
        assert what and trap != "–", f"the docstring of {key}.py names no trap (`Traps: ...`)"


def test_every_mixer_is_in_the_readme_and_calibrated_as_told() -> None:
    readme = (ROOT / "README.md").read_text()
    declared = {"lolcats", "hedgehog", "liger", "lizard"}
    for key in keys("mixers"):
        assert f"`{key}`" in readme
        if key != "composed":  # docs/mixers.md says which recipes calibrate
            expected = "declared" if key in declared else "calibrated"
            assert Recipe.load(f"demo/{key}", "demo").init.type == expected


@pytest.mark.parametrize("name", ["demo-lolcats", "demo-catalogue", *(f"teacher-30m-{n}" for n in RESULTS)])
def test_linear_off_in_the_results_is_the_gap_without_that_branch(name: str) -> None:
    """As measured, in every table, beside the gap with the branch."""
    text = (ROOT / "docs" / "results.md").read_text()
    found = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    for points in [dict(found)] if isinstance(found[0], list) else [one["points"] for one in found]:
        teacher, last = ({x["length"]: x["loss"] for x in points[p]["losses"]} for p in ("teacher", list(points)[-1]))
        off = {x["length"]: x["loss"] for x in points[list(points)[-1]]["branches"] if x["branch"] == "linear"}
        if not off:
            continue
        gap = f"| {last[2048] - teacher[2048]:+.3f} |"
        lengths = [2048] if name in ALONE else [1024, 2048]
        without = f"| {' | '.join(f'{off[n] - teacher[n]:+.3f}' for n in lengths)} |"
        assert [row for row in text.splitlines() if gap in row and without in row], (gap, without)


def test_state_formulas_count_the_numbers_of_a_state() -> None:
    build = script("build_mixers")
    sizes = dict(list(build.SYMBOLS.items())[:4])
    for key, mixer in build.presets():
        formula = build.formula(mixer)
        product = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula.replace(",", ""))
        counted = sum(torch.Size(shape).numel() for shape in build.state_shapes(mixer))
        assert eval(product, {}, sizes) == counted, f"{key}: {formula}"


def test_every_recurrence_is_in_the_table() -> None:
    build, tested = script("build_mixers"), {case.recurrence.name for case in CASES}
    assert {op.name for op in build.recurrences().values()} == tested


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_in_the_documentation_parse(page: str, line: str, decay: Any) -> None:
    name, *arguments = shlex.split(line, comments=True)[1 + line.startswith("PYTHONPATH") :]
    command = importlib.import_module(f"linearize.cli.{name}")
    parser = Parser(prog=name, allow_abbrev=False)
    command.add_arguments(parser)
    parsed = parser.parse_intermixed_args(arguments)
    if name in ("convert", "plan"):
        recipe = Recipe.load(parsed.recipe, parsed.model, parsed.overrides)
        assert bool(recipe.stages) != ("stages=[]" in parsed.overrides)


def test_the_parsing_test_can_fail() -> None:
    assert len(COMMANDS) > 15
    with pytest.raises(UserError, match="unrecognized arguments"):
        test_commands_in_the_documentation_parse("", "linearize plan --model demo --dry-run", None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        place = page.parent / target if target else page
        assert place.exists(), f"{page.name} links to {target}"
        headings = re.findall(r"^#+ (.+)$", place.read_text(), re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in anchors, f"{page.name} links to {target}#{anchor}"


def test_the_example_of_a_family_passes_the_tests_of_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import linearize.families
    from linearize.hf import auto

    (code,) = blocks(ROOT / "docs" / "adding_a_family.md", "python")
    (tmp_path / "starcoder2.py").write_text(code)
    assert "starcoder2" not in keys("families")
    monkeypatch.setattr(linearize.families, "__path__", [*linearize.families.__path__, str(tmp_path)])
    assert "starcoder2" in keys("families")
    monkeypatch.setattr(auto, "register", lambda: None)  # it ran before there was this family
    try:
        for mask in (None, "left", "right"):
            test_families.test_the_teachers_heads_are_what_projection_rotation_scale_and_reach_give("starcoder2", mask)
        test_families.test_both_stages_train_and_touch_nothing_else("starcoder2")
        test_families.test_shapes_are_those_of_the_projections("starcoder2")
    finally:
        sys.modules.pop("linearize.families.starcoder2")


def test_the_table_of_families_is_complete() -> None:
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{key}`" in readme for key in keys("families"))


@pytest.mark.parametrize(
    "page", ["README.md", "docs/adding_a_family.md", "docs/adding_a_mixer.md", "docs/concepts.md", "docs/mixers.md"]
)
def test_lines_are_short(page: str) -> None:
    lines = (ROOT / page).read_text().splitlines()
    assert not [line for line in lines if len(line) > 125 and not line.startswith("|")]


@pytest.fixture
def decay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The mixer of docs/adding_a_mixer.md as the module `my_mixers`, in a current folder that also holds its part as
    `my_parts`, the recipe of docs/mixers.md, and the pairs of docs/quickstart.md with their recipe.
    """
    mixer, _, part, _ = blocks(ROOT / "docs" / "adding_a_mixer.md", "python")
    (tmp_path / "my_mixers.py").write_text(mixer)
    (tmp_path / "my_parts.py").write_text(part)
    (tmp_path / "mine.yaml").write_text(blocks(ROOT / "docs" / "mixers.md", "yaml")[0])
    (tmp_path / "preferences.yaml").write_text(blocks(QUICKSTART, "yaml")[1])
    (tmp_path / "pairs.jsonl").write_text(blocks(QUICKSTART, "json")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("my_mixers", "my_parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("my_mixers")


def test_the_example_mixer_and_part_keep_the_contract(decay: Any) -> None:
    _, mixer, _, part = blocks(ROOT / "docs" / "adding_a_mixer.md", "python")
    for code in (mixer, part):
        exec(compile(code, "adding_a_mixer.md", "exec"), {})


def test_the_broken_example_is_told_as_the_page_says(decay: Any, tmp_path: Path) -> None:
    code = (tmp_path / "my_mixers.py").read_text()
    (tmp_path / "my_mixers.py").write_text(code.replace("mask=ctx.mask, ", ""))
    importlib.reload(decay)
    with pytest.raises(AssertionError) as caught:
        check_mixer("my_mixers:Decay", {"first_decay": 0.98})
    (shown,) = blocks(ROOT / "docs" / "adding_a_mixer.md", "text")
    assert f"AssertionError: {caught.value}" == " ".join(shown.split())


def test_the_example_part_calibrates(decay: Any) -> None:
    settings = yaml.safe_load(blocks(ROOT / "docs" / "adding_a_mixer.md", "yaml")[1])["mixer"]
    mixer = find("mixers", settings.pop("type"), Mixer)
    config = config_from_dict(mixer.Config, settings, lambda package, key: find(package, key, Part))
    module = mixer(config, HeadShape(4, 2, 8, 8, 32, 1.0))
    module.initialise("mixer", seed=0)
    lives = [math.log(2) / float(b.sigmoid()) for b in module.decay.bias.detach()]
    assert lives == pytest.approx([8 * 32 ** (h / 3) for h in range(4)], rel=1e-4)
    module.calibrate(Calibration(torch.tensor([2.0, 5.0, 50.0, 900.0]), torch.zeros(4)))
    lives = [math.log(2) / float(b.sigmoid()) for b in module.decay.bias.detach()]
    assert lives == pytest.approx([2.0, 5.0, 50.0, 900.0], rel=1e-4)


def test_the_example_recipe_makes_the_plan_that_is_shown(decay: Any) -> None:
    plan = str(plan_of(Recipe.load("mine.yaml", "demo")))
    shown = blocks(ROOT / "docs" / "mixers.md", "text")[1]
    assert plan[plan.index("layers ") :].startswith(shown)


def test_the_example_mixer_converts_and_generates(decay: Any, pico_model: Any) -> None:
    settings = blocks(ROOT / "docs" / "adding_a_mixer.md", "yaml")[0]
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


def test_the_example_of_preferences_trains(decay: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.data.dataset.HF_HOME", str(tmp_path / "home"))
    changes = ["data.seq_len=64", "data.max_tokens=2k", "init.tokens=64", "evaluation=null", "model.device=cpu"]
    steps = ["stages.0.tokens=128", "stages.1.tokens=256", "stages.2.tokens=6k"]
    recipe = Recipe.load("preferences.yaml", overrides=[*changes, *steps])
    lines = metrics(convert(recipe, tmp_path / "out", say=lambda text: None) / "run" / "2-dpo")
    assert [stage["type"] for stage in Recipe.load("preferences.yaml").stages][-1] == "dpo" and len(lines) == 6
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["accuracy"] == 1 and lines[-1]["margin"] > 0 and lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_python_examples_use_names_that_exist(page: str) -> None:
    import linearize

    code = "\n".join(blocks(ROOT / page, "python"))
    compile(code, page, "exec")
    used = set(re.findall(r"linearize\.(\w+)", code))
    assert used and used <= set(linearize.__all__)
