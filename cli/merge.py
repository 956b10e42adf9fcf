"""Average checkpoints of one architecture and mixer into a new one, tensor by tensor.

linearize merge runs/seed-0 runs/seed-1 --weights 0.3,0.7 -o runs/merged
"""

from __future__ import annotations

import argparse


def shares(text: str) -> list[float]:
    """`0.5,0.5` -> [0.5, 0.5]."""
    return [float(part) for part in text.split(",")]


shares.__name__ = "list of numbers"  # what argparse calls it in its messages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folders of checkpoints, two or more")
    parser.add_argument("--weights", type=shares, metavar="W,W", help="share of each, with sum 1 (default: equal)")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of the result, not there yet")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from linearize.merge import merge

    print(f"checkpoint written to {merge(arguments.folders, arguments.output, arguments.weights)}")
