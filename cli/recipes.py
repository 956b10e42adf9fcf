"""List the shipped recipes, or print one to start your own from.

linearize recipes llama-3-8b/lolcats > mine.yaml
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="recipe to print, such as demo/lolcats")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from linearize.errors import UserError, did_you_mean
    from linearize.recipe import available

    known = available()
    if arguments.name is None:
        width = max(map(len, known))
        for name, path in known.items():
            print(f"{name:<{width}}  {path.read_text().partition(chr(10))[0].lstrip('# ')}")
        return
    if arguments.name not in known:
        raise UserError(f"unknown recipe {arguments.name!r}{did_you_mean(arguments.name, known)}")
    print(f"# {known[arguments.name]}\n{known[arguments.name].read_text()}", end="")
