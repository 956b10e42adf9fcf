"""What is told of an evaluation beforehand is what it then reads, and a terminal shows how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from linearize import progress
from linearize.evals.config import EvalConfig
from linearize.evals.measure import measure
from linearize.evals.probes.base import Probe, probe_of
from linearize.evals.workload import Work, summary, workload, works_on
from linearize.preflight import outline, plan_of
from linearize.recipe import Recipe
from linearize.registry import find, keys
from linearize.swap import teacher_path

TEXT = torch.randint(3, 97, (2048,), generator=torch.Generator().manual_seed(0))
SMALL = {"windows": 3, "prompts": 3, "tokens": 5, "lengths": [450, 512], "items": 2, "depths": [0.0, 1.0]}
"""Settings by which probes are quick, where they have them."""
CONFIG: dict[str, Any] = {"lengths": [32, 48], "windows": 3, "recall": [[1, 30], [2, 200]], "recall_items": 3}


def small(key: str) -> dict[str, Any]:
    known = find("evals.probes", key, Probe).Config.model_fields
    return {"type": key, **{name: value for name, value in SMALL.items() if name in known}}


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bars that are drawn, with what they counted."""
    drawn: list[Any] = []

    class Bar:
        def __init__(self, **settings: Any):
            self.name, self.total, self.disable, self.n = settings["desc"], settings["total"], settings["disable"], 0
            drawn.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            self.closed = True

        def update(self, n: int) -> None:
            self.n += n

    monkeypatch.setattr(progress, "tqdm", Bar)
    return drawn


def test_every_measurement_reads_what_was_told(
    bars: list[Any], converted: Callable[..., Any], pico_tokenizer: Any
) -> None:
    quick = [key for key in keys("evals.probes") if key not in ("grammar", "common_words", "frequent_words")]
    config = EvalConfig.model_validate({**CONFIG, "probes": [small(key) for key in quick]})
    model = converted("lolcats", "LSL")
    works = works_on(model, config, 32, teacher=True)
    measure(model, pico_tokenizer, config, token_ids=TEXT, seq_len=32, has_teacher=True)
    assert [bar.name for bar in bars] == [work.name for work in works if work.tokens]
    assert {work.name for work in works if not work.tokens} == {"probe option_permutation"}
    for bar in bars:
        assert bar.closed
        # of recall it is told without the words of facts and questions
        assert bar.n > bar.total if bar.name == "recall" else bar.n == bar.total, bar.name


def test_the_teacher_reads_what_fits_it(bars: list[Any], converted: Callable[..., Any], pico_tokenizer: Any) -> None:
    config = EvalConfig.model_validate(
        {**CONFIG, "probes": [small("gates"), small("kl_by_position"), small("passkey")]}
    )
    model = converted("lolcats", "LSL")
    with teacher_path(model):
        measure(model, pico_tokenizer, config, token_ids=TEXT, seq_len=32, has_teacher=True)
    assert [bar.name for bar in bars] == ["losses", "recall", "probe passkey"]


def test_bars_are_for_terminals(
    converted: Callable[..., Any], pico_tokenizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    config = EvalConfig.model_validate({"lengths": [32], "windows": 2, "recall": False, "divergence": False})
    measure(converted("lolcats"), pico_tokenizer, config, token_ids=TEXT, seq_len=32)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    measure(converted("lolcats"), pico_tokenizer, config, token_ids=TEXT, seq_len=32)
    drawn = capsys.readouterr().err
    assert "losses:" in drawn and "branches:" in drawn and "/64.0" in drawn
    monkeypatch.setenv("RANK", "1")
    measure(converted("lolcats"), pico_tokenizer, config, token_ids=TEXT, seq_len=32)
    assert capsys.readouterr().err == "", "one process of several shows them"


def test_what_is_told_of_the_work() -> None:
    values = {**CONFIG, "tasks": ["piqa", "copa"], "sample_prompt": "x", "probes": ["mqar", "mqar", {"type": "gates"}]}
    config = EvalConfig.model_validate({**values, "probes": [{"type": "mqar", "pairs": 8}, "mqar", "gates"]})
    size, *lines = summary(workload(config, 1024, branches=2, questions={"piqa": 1838, "copa": 100}))
    assert lines == [
        "losses: 3 windows of 32 tokens, 3 of 48",
        "divergence from the teacher: 3 windows of 32 tokens, 3 of 48",
        "branches: 2 times 3 windows of 32 tokens, 3 of 48",
        "recall: 3 questions of 54 tokens, 3 of 224",
        "tasks piqa, copa: 1,938 questions",
        "probe mqar: 80 questions of 512 tokens, 80 of 1,024, 80 of 2,048",
        "probe mqar (2): 80 questions of 512 tokens, 80 of 1,024, 80 of 2,048",
        "probe gates: 8 windows of 1,024 tokens",
        "sample",
    ]
    exact = 4 * 3 * 80 + 3 * (54 + 224) + 2 * 80 * 3584 + 8 * 1024
    assert size == f"about {round(exact, -4):,} tokens and tasks" and exact == 583_426
    assert str(Work("tasks", what="piqa")) == "tasks piqa"


@pytest.mark.parametrize(
    ("settings", "points"), [([], 5), (["evaluation.between=false"], 2), (["init.type=declared"], 4)]
)
def test_the_plan_says_what_is_measured(settings: list[str], points: int) -> None:
    recipe = Recipe.load("demo/gdn", "demo", ["evaluation.probes=[mqar]", *settings])
    said = outline(recipe, plan_of(recipe))
    assert f"\nmeasured    {points} times, about " in said and "branches" not in said
    assert "\n            probe mqar: 80 questions of 512 tokens, 80 of 1,024, 80 of 2,048" in said
    mixed = Recipe.load("demo/lolcats", "demo")
    assert "branches: 2 times" in outline(mixed, plan_of(mixed))
    assert "\n            on demo, split dev\n" in said
    elsewhere = Recipe.load("default/gdn", "demo", ["evaluation.text=demo", "evaluation.split=dev"])
    assert "\n            on demo, split dev\n" in outline(elsewhere, plan_of(elsewhere))
    silent = Recipe.load("demo/gdn", "demo", ["evaluation=null"])
    assert "measured" not in outline(silent, plan_of(silent))


def test_a_probe_of_ones_own_need_not_know_its_work() -> None:
    assert Probe(None).rows(64) == [] and probe_of("gates").rows(64) == [(8, 64)]
