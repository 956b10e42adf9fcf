"""The entry point: which commands exist, that help is quick, and what errors become."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from linearize import __version__
from linearize.cli import convert as convert_command
from linearize.cli import main as entry
from linearize.errors import UserError

COMMANDS = ["bench", "convert", "doctor", "evaluate", "generate", "merge", "plan", "push", "recipes", "report", "serve"]

CHECK = """
import sys, time
from linearize.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
heavy = {"torch", "transformers", "datasets", "pydantic", "numpy"} & set(sys.modules)
assert code in (0, None) and not heavy, (code, heavy)
assert time.process_time() < 1, time.process_time()
"""


def test_every_file_is_a_command() -> None:
    folder = Path(entry.__file__).parent
    files = {p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")}
    assert entry.commands() == sorted(files - {"main"}) == COMMANDS


@pytest.mark.parametrize(
    "arguments", [["--help"], [], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=str
)
def test_help_takes_no_torch_and_less_than_a_second(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", CHECK, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if arguments == ["--version"]:
        assert done.stdout.strip() == f"linearize {__version__}"
    elif arguments and arguments[0] in COMMANDS:
        assert done.stdout.startswith(f"usage: linearize {arguments[0]}")
    else:
        assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_every_default_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        entry.main([name, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    parser = entry.Parser(prog=name, formatter_class=entry.Help)
    entry._load(name).add_arguments(parser)
    for action in parser._actions:
        text = " ".join((parser._get_formatter()._expand_help(action)).split())
        assert text in printed or not action.help
        assert text.count("default:") <= 1
        default = action.default
        if action.option_strings and default not in (None, argparse.SUPPRESS, [], ()) and not isinstance(default, bool):
            assert "default:" in text, action.option_strings
            shown = ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
            assert default == "auto" or text.endswith(f"(default: {shown})")


def test_the_test_of_defaults_can_fail() -> None:
    parser = entry.Parser(prog="x", formatter_class=entry.Help)
    parser.add_argument("--share", type=float, default=0.5, help="in 100%% of cases")
    parser.add_argument("--names", default=["a%", "b"], help="some")
    parser.add_argument("--plain", help="nothing")
    assert "in 100% of cases (default: 0.5)" in parser.format_help() and "some (default: a%,b)" in parser.format_help()
    assert parser.format_help().count("default") == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "convrt --model demo",
            "error: unknown command 'convrt'; did you mean 'convert'? known: bench, convert,",
        ),
        ("convert --modle demo", "error: unrecognized arguments: --modle"),
        ("convert --mod demo", "error: unrecognized arguments: --mod"),
        ("convert", "error: which model? give --model NAME"),
        (
            "generate somewhere",
            "error: the following arguments are required: --prompt; `linearize generate --help`",
        ),
        ("bench --lengths 12,x", "error: argument --lengths: invalid list of positive numbers value: '12,x'"),
        ("bench --batch-size 0 x", "error: argument --batch-size: invalid positive number value: '0'"),
    ],
)
def test_mistakes_on_the_command_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message) and printed.err.count("\n") == 1 and not printed.out


def stop_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: Any) -> None:
        raise error

    monkeypatch.setattr(convert_command, "run", run)


def test_a_user_error_is_only_its_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stop_with(UserError("the disk is full"), monkeypatch)
    assert entry.main(["convert"]) == 2
    assert capsys.readouterr().err == "error: the disk is full\n"


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), AssertionError("ours")])
def test_other_errors_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_with(error, monkeypatch)
    with pytest.raises(type(error), match="ours"):
        entry.main(["convert"])


@pytest.mark.parametrize("asked", ["", " --resume"])
def test_an_interrupted_conversion_says_how_to_go_on(
    asked: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_with(KeyboardInterrupt(), monkeypatch)
    arguments = ["convert", "--model", "demo", "-o", "my folder", *asked.split()]
    assert entry.main(arguments) == 130
    command = "linearize convert --model demo -o 'my folder' --resume"
    assert capsys.readouterr().err == f"\ninterrupted; go on with: {command}\n"


def test_sigterm_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Between steps, where it is a SystemExit, and anywhere else, where it is a signal."""
    told = "\nterminated; go on with: linearize convert -o out --resume\n"
    stop_with(SystemExit(143), monkeypatch)
    assert entry.main(["convert", "-o", "out"]) == 143 and capsys.readouterr().err == told
    monkeypatch.setattr(convert_command, "run", lambda arguments: None)
    assert entry.main(["convert", "-o", "out"]) == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    stop_with(SystemExit(3), monkeypatch)
    with pytest.raises(SystemExit, match="3"):
        entry.main(["convert"])


@pytest.mark.parametrize("while_importing", ["numpy", "numpy.linalg", "transformers", "linearize.evals.evaluate"])
def test_sigterm_ends_what_imports(while_importing: str) -> None:
    """The import of numpy by torch swallows exceptions."""
    code = f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {while_importing!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Finder())
from linearize.cli.main import main
sys.exit(main(["evaluate", "nowhere", "--output", "x.json"]))
"""
    assert_terminated(code)


def test_sigterm_ends_what_runs() -> None:
    """Nothing that the command does between two of its own lines can swallow it."""
    code = """
import os, signal, sys
from linearize.cli import evaluate
def run(arguments):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        pass
    print("went on")
evaluate.run = run
from linearize.cli.main import main
sys.exit(main(["evaluate", "nowhere", "--output", "x.json"]))
"""
    assert_terminated(code)


def assert_terminated(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    told = "\nterminated; go on with: linearize evaluate nowhere --output x.json\n"
    assert (done.returncode, done.stderr, done.stdout) == (143, told, "")


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--output", "a b.json"], "; go on with: linearize evaluate demo --output 'a b.json'"),
        (["--output=b.json"], "; go on with: linearize evaluate demo --output=b.json"),
        ([], "; with --output FILE, the same command would go on where it was stopped"),
    ],
)
def test_an_interrupted_evaluation_says_how_to_go_on(
    arguments: list[str], remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from linearize.cli import evaluate

    monkeypatch.setattr(evaluate, "run", lambda arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert entry.main(["evaluate", "demo", *arguments]) == 130
    assert capsys.readouterr().err == f"\ninterrupted{remedy}\n"


def test_other_interruptions_have_nothing_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from linearize.cli import doctor

    monkeypatch.setattr(doctor, "run", lambda arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert entry.main(["doctor"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
