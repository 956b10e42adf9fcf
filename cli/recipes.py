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
    import yaml

    from linearize.errors import UserError, did_you_mean
    from linearize.recipe_files import available, read_recipe

    known = available()
    if arguments.name is None:
        width = max(map(len, known))
        for name, path in known.items():
            print(f"{name:<{width}}  {path.read_text().partition(chr(10))[0].lstrip('# ')}")
        return
    found = next((n for n in (arguments.name, f"default/{arguments.name}") if n in known), None)
    if found is None:
        raise UserError(f"unknown recipe {arguments.name!r}{did_you_mean(arguments.name, known)}")
    path, text = known[found], known[found].read_text()
    if "extends:" in text:
        text = f"{text.partition(chr(10))[0]}\n{yaml.safe_dump(read_recipe(path), sort_keys=False)}"
    print(f"# {path}\n{text}", end="")
