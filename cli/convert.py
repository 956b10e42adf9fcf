"""Convert a model as a recipe says and write a Hugging Face checkpoint.

The recipe is the one shipped for the model and method, or a YAML file; `key=value` changes single settings:

  linearize convert --model llama-3-8b --recipe lolcats stages.0.tokens=2M layers=LLLS
"""

from __future__ import annotations

import argparse
import shlex
import sys

from linearize.cli._arguments import add_recipe_arguments, load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_recipe_arguments(parser)
    parser.add_argument("-o", "--output", metavar="DIR", help="folder of the checkpoint (default: MODEL-RECIPE, here)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop; no weights are loaded")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted conversion in the same folder")
    parser.add_argument(
        "--push-to-hub", metavar="USER/NAME", help="upload the checkpoint when it is done, into a private repository"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    recipe = load_recipe(arguments)
    if arguments.dry_run:
        from linearize.cli.plan import show_plan

        show_plan(recipe)
        return
    from linearize.errors import UserError
    from linearize.hub.contents import token_line
    from linearize.hub.push import push, reserve
    from linearize.pipeline import convert
    from linearize.preflight import check_sources, plan_of
    from linearize.training.processes import is_main

    repo = arguments.push_to_hub if is_main() else None
    if repo is not None:
        # What stands in the way should not wait until after the training.
        if token_line(recipe.to_yaml().encode()) is not None:
            raise UserError(
                "the recipe has a token of the hub in it, so it cannot be pushed; take it out, and revoke it"
            )
        plan_of(recipe)
        check_sources(recipe)
        reserve(repo)
    out = convert(recipe, arguments.output, resume=arguments.resume)
    if repo is not None:
        later = f"The checkpoint is complete; push it with: {shlex.join(['linearize', 'push', str(out), repo])}"
        try:
            print(f"pushed to {push(out, repo)}")
        except UserError as error:
            raise UserError(f"{error}. {later}") from error
        except BaseException:  # such as an interruption
            print(f"\nThe push failed. {later}", file=sys.stderr)
            raise
