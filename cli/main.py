"""Entry point of the `linearize` command: finds the command's file, runs it and turns errors into exit codes.

Every file of this folder is a command, except this one and those that begin with an underscore. The docstring
of a command is its help; it defines `add_arguments(parser)` and `run(arguments)`; torch is imported in `run`.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import pkgutil
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn

from linearize import __version__
from linearize.errors import UserError, did_you_mean

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s, so that all mistakes look alike."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists what is possible")


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that tells the default of every option, unless its text does, as where the value depends on something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if "default:" in text or isinstance(default, bool) or default in (None, argparse.SUPPRESS, "", [], ()):
            return text
        shown = ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"


def commands() -> list[str]:
    """Names of the commands: the files of this folder."""
    folder = importlib.import_module("linearize.cli").__path__
    names = (module.name for module in pkgutil.iter_modules(folder))
    return sorted(name for name in names if name != "main" and not name.startswith("_"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Returns:
        The exit code: 0, 2 for a `UserError`, 130 when interrupted, 143 after SIGTERM. Other exceptions keep their
        traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _terminable(argv):
            _dispatch(argv)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"\ninterrupted{_remedy(argv)}", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        if stop.code != TERMINATED:
            raise
        sys.stderr.write(_terminated(argv))
        return TERMINATED
    return 0


def _terminated(argv: list[str]) -> str:
    return f"\nterminated{_remedy(argv)}\n"


@contextmanager
def _terminable(argv: list[str]) -> Iterator[None]:
    """Inside the context SIGTERM ends the process with words, for the commands that can go on and should say how.

    An exception would not do: it could be raised while a module is imported, and numpy's import swallows it.
    """
    default = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not (default and _remedy(argv) and threading.current_thread() is threading.main_thread()):
        yield
        return

    def stop(number: int, frame: object) -> NoReturn:
        os.write(2, _terminated(argv).encode())  # print may be what was interrupted
        os._exit(TERMINATED)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return
    if argv[0] == "--version":
        print(f"linearize {__version__}")
        return
    name, *rest = argv
    if name not in commands():
        raise UserError(f"unknown command {name!r}{did_you_mean(name, commands())}")
    command = _load(name)
    parser = Parser(
        prog=f"linearize {name}",
        description=command.__doc__,
        formatter_class=Help,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    arguments = parser.parse_intermixed_args(rest)
    _show_log()
    command.run(arguments)


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"linearize.cli.{name}")


def _overview() -> str:
    lines = ["usage: linearize COMMAND ...", ""]
    lines += ["Turn a pretrained causal LM into a linear-attention or hybrid model.", ""]
    for name in commands():
        summary = (_load(name).__doc__ or "").partition("\n")[0]
        lines.append(f"  {name:<10} {summary}")
    lines += ["", "`linearize COMMAND --help` explains a command; `linearize --version` prints the version."]
    return "\n".join(lines)


def _remedy(argv: list[str]) -> str:
    """How to go on after an interruption, for the command that can."""
    again = argv
    if argv[:1] == ["convert"]:
        again = argv if "--resume" in argv else [*argv, "--resume"]
    elif argv[:1] != ["evaluate"]:
        return ""
    elif not any(argument.partition("=")[0] == "--output" for argument in argv):
        return "; with --output FILE, the same command would go on where it was stopped"
    return f"; go on with: {shlex.join(['linearize', *again])}"


def _show_log() -> None:
    """Let the toolkit's own log, such as which backend `auto` took, reach the terminal."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("linearize")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]


if __name__ == "__main__":
    sys.exit(main())
