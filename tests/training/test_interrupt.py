"""Ctrl-C and SIGTERM: the step ends, what it did is kept, and the run goes on from there."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainable import dataset, make_stage

from linearize.training.interrupt import between_steps
from linearize.training.loop import MetricsLog


def run_until(number: int, step: int, model: Any, data: Any, folder: Path, settings: dict[str, Any]) -> BaseException:
    """What a stage ends with that receives a signal in a step."""
    write = MetricsLog.write

    def signalled(self: MetricsLog, at: int, values: dict[str, float]) -> None:
        write(self, at, values)
        if at == step:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(BaseException) as caught:
        patch.setattr(MetricsLog, "write", signalled)
        make_stage("attention_transfer", **settings).run(model, data, folder)
    return caught.value


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_keeps_its_steps(
    converted: Callable[..., Any], tmp_path: Path, pico_tokenizer: Any, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    data, handlers = dataset(tmp_path, pico_tokenizer), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    settings = {"steps": 8, "checkpoint_every": 100}
    straight, stopped = converted("lolcats"), converted("lolcats")
    make_stage("attention_transfer", **settings).run(straight, data, tmp_path / "straight")
    ended = run_until(number, 4, converted("lolcats"), data, tmp_path / "stopped", settings)
    assert isinstance(ended, KeyboardInterrupt) or (isinstance(ended, SystemExit) and ended.code == 143)
    assert isinstance(ended, KeyboardInterrupt) == (number == signal.SIGINT)
    assert "stopping after this step" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "stopped").glob("step-*")] == ["step-00000005.safetensors"]
    make_stage("attention_transfer", **settings).run(stopped, data, tmp_path / "stopped", resume=True)
    for name, tensor in straight.state_dict().items():
        assert tensor.equal(stopped.state_dict()[name]), name
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_in_the_last_step_loses_nothing_either(
    converted: Callable[..., Any], tmp_path: Path, pico_tokenizer: Any
) -> None:
    data, model, settings = dataset(tmp_path, pico_tokenizer), converted("lolcats"), {"steps": 4}
    assert isinstance(run_until(signal.SIGINT, 3, model, data, tmp_path / "run", settings), KeyboardInterrupt)
    resumed = converted("lolcats")
    make_stage("attention_transfer", **settings).run(resumed, data, tmp_path / "run", resume=True)
    for name, tensor in model.state_dict().items():
        assert tensor.equal(resumed.state_dict()[name]), name
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 4


def test_a_second_signal_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), between_steps() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert isinstance(stop(), KeyboardInterrupt)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on after the second signal")


def test_other_threads_take_no_signals() -> None:
    found: list[Any] = []

    def work() -> None:
        with between_steps() as stop:
            found.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]
