"""Show several conversions side by side: parameters, state, loss after each step, recall.

linearize report runs/gdn runs/kda runs/lolcats
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folders that `linearize convert` wrote")
    parser.add_argument("--output", metavar="FILE", help="write everything the table is made of there as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from linearize.evals.report import report, to_json

    print(report(arguments.folders))
    if arguments.output:
        to_json(arguments.folders, arguments.output)
        print(f"\nreport written to {arguments.output}")
