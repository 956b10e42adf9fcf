"""How far long work is told to be: bars for readers at a terminal, lines for log files, by one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainable import dataset, make_stage, pairs

from linearize import progress


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines whenever something was counted."""
    monkeypatch.setattr(progress, "EVERY", 0.0)


@pytest.mark.usefixtures("at_once")
def test_a_log_file_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("finetune", unit="tok", total=4000, initial=1000) as shown:
        shown.set_postfix(loss="2.5", refresh=False)
        shown.update(1000)
    told = capsys.readouterr().err
    first, last = told.splitlines()
    assert first.startswith("finetune:  50% 2.00k/4.00k [00:00<") and first.endswith("tok/s, loss=2.5]")
    assert last.startswith("finetune:  50%") and "\r" not in told
    with pytest.raises(KeyError), progress.bar("choosing layers", unit="look") as shown:
        shown.update(3)
        raise KeyError
    assert [line[:22] for line in capsys.readouterr().err.splitlines()] == ["choosing layers: 3look"] * 2


def test_short_work_leaves_its_end_alone_and_measurements_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("finetune", unit="tok", total=2) as shown:
        shown.update(1)
        shown.update(1)
    with progress.progress("losses", 10):
        progress.advance(10)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("finetune: 100% 2.00/2.00 [")


@pytest.mark.usefixtures("at_once")
def test_one_process_tells(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    for anywhere in (False, True):  # whichever process tokenises, the others wait for it
        with progress.bar("tokenising", unit="tok", anywhere=anywhere) as shown:
            shown.update(1)
        assert bool(capsys.readouterr().err) == anywhere


@pytest.mark.parametrize("terminal", [False, True])
def test_training_and_tokenising_follow_the_rule(
    terminal: bool,
    converted: Any,
    pico_tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if terminal:
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    data = dataset(tmp_path, pico_tokenizer)
    pairs(tmp_path / "cache", pico_tokenizer)
    make_stage("finetune", train=["mixer"], steps=2).run(converted("lolcats", "LSL"), data, tmp_path / "stage")
    told = [line for line in capsys.readouterr().err.splitlines(keepends=True) if "Generating" not in line]
    ours = [line for line in told if any(name in line for name in ("tokenising", "finetune"))]
    assert {line.strip().partition(":")[0] for line in ours} == {"tokenising", "finetune"}
    assert any("\r" in line or "\u2588" in line for line in ours) == terminal
    if not terminal:
        assert [line[:15] for line in ours] == ["tokenising: 2.9", "tokenising: 100", "finetune: 100% "]
        assert "loss=" in ours[-1]
