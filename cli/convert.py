"""Convert a model as a recipe says and write a Hugging Face checkpoint.

The recipe is the one shipped for the model and method, or a YAML file; `key=value` changes single settings:

  linearize convert --model llama-3-8b --recipe lolcats stages.0.tokens=2M layers=LLLS
"""

from __future__ import annotations

import argparse

from linearize.cli._arguments import add_recipe_arguments, load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_recipe_arguments(parser)
    parser.add_argument("-o", "--output", metavar="DIR", help="folder of the checkpoint (default: MODEL-MIXER, here)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop; no weights are loaded")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted conversion in the same folder")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    recipe = load_recipe(arguments)
    if arguments.dry_run:
        from linearize.cli.plan import show_plan

        show_plan(recipe)
        return
    from linearize.pipeline import convert

    convert(recipe, arguments.output, resume=arguments.resume)
