"""Print what `convert` would do to each layer, from the model's configuration alone.

No weights are loaded, and every error that the recipe can cause on this model shows here already. So do files of
training and held-out text that are missing, cannot be read or lack the columns, and unknown tasks; hub datasets are not
asked for.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from linearize.cli._arguments import add_recipe_arguments, load_recipe

if TYPE_CHECKING:
    from linearize.recipe import Recipe

add_arguments = add_recipe_arguments


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    show_plan(load_recipe(arguments))


def show_plan(recipe: Recipe) -> None:
    """Print the plan of a recipe."""
    from linearize.preflight import check_sources, outline, plan_of

    plan = plan_of(recipe)
    check_sources(recipe)
    print(outline(recipe, plan))
