"""Measure a checkpoint side by side with the model it was converted from.

Losses on held-out text by length and position, the same with each branch of the mixers switched off, recall
of facts, and tasks of the lm-evaluation-harness.
"""

from __future__ import annotations

import argparse
import functools
import sys

from linearize.cli._arguments import (
    add_trust,
    from_zero,
    names,
    numbers,
    positive,
    positive_or_auto,
    probes,
    take_defaults,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments, with the defaults of `linearize.evaluate`."""
    parser.add_argument("path", metavar="PATH", help="folder or hub name of a checkpoint, or a model alias")
    parser.add_argument(
        "--teacher",
        metavar="NAME",
        help="model to compare with, or none (default: the one it was converted from)",
    )
    parser.add_argument("--tasks", type=names, metavar="A,B", help="lm-evaluation-harness tasks or groups")
    parser.add_argument("--include-path", metavar="DIR", help="folder with lm-evaluation-harness task files")
    parser.add_argument("--tasks-from", metavar="DIR", help="folder of questions in .jsonl files, each a task")
    parser.add_argument(
        "--num-fewshot", type=from_zero, metavar="N", help="examples in the prompts of tasks (default: each task's own)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="questions per task (default: all)")
    parser.add_argument(
        "--text",
        metavar="SOURCE",
        help="held-out text: demo, a file or a hub dataset (default: that of the checkpoint's recipe, else demo)",
    )
    parser.add_argument("--split", metavar="NAME", help="split of that text (default: that of the recipe, else dev)")
    parser.add_argument(
        "--lengths",
        type=numbers,
        metavar="N,N",
        help="context lengths of the loss in tokens (default: the training length and twice that)",
    )
    parser.add_argument("--windows", type=positive, metavar="N", help="windows of text per length")
    parser.add_argument("--no-recall", dest="recall", action="store_false", help="ask no recall questions")
    parser.add_argument("--recall-items", type=positive, metavar="N", help="questions per recall case")
    parser.add_argument("--no-branches", dest="branches", action="store_false", help="do not switch branches off")
    parser.add_argument(
        "--no-divergence",
        dest="divergence",
        action="store_false",
        help="do not compare predictions with the teacher's, which holds both models in memory",
    )
    parser.add_argument(
        "--probes",
        type=probes,
        metavar="A,B",
        help="further measurements, such as kl_by_position, groups of them, such as recall, or 'mqar(pairs=8)'",
    )
    parser.add_argument("--prompt", dest="sample_prompt", metavar="TEXT", help="a prompt to continue greedily")
    parser.add_argument(
        "--batch-size", type=positive_or_auto, metavar="N", help="rows per forward; auto: in tasks, what memory holds"
    )
    parser.add_argument(
        "--dtype", metavar="NAME", help="type of the weights of both models (default: the checkpoint's)"
    )
    parser.add_argument("--device", metavar="NAME", help="default: a GPU if there is one")
    parser.add_argument(
        "--output", metavar="FILE", help="write the report there as JSON; the same command goes on where it was stopped"
    )
    add_trust(parser)
    take_defaults(parser, "linearize.evals.evaluate", "evaluate")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from linearize import evaluate

    options = vars(arguments)
    if options.get("teacher") == "none":
        options["teacher"] = False
    say = functools.partial(print, file=sys.stderr, flush=True)
    print(evaluate(options.pop("path"), **options, say=say).table())
    if options["output"] is not None:
        print(f"\nreport written to {options['output']}")
