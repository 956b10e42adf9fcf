"""Upload a checkpoint to the Hugging Face Hub, into a private repository unless --public is given.

It goes on where an interrupted push stopped, and sends only what the hub does not have:

  linearize push my-model USER/NAME --dry-run

The token is that of `hf auth login` or of the variable HF_TOKEN.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folder", metavar="DIR", help="folder that `linearize convert` wrote")
    parser.add_argument("repo", metavar="USER/NAME", help="model repository; made if it is not there")
    parser.add_argument("--public", action="store_true", help="let everyone see it (default: private)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made if it is not there (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")
    parser.add_argument("--adapter-only", action="store_true", help="send only the LoRA in DIR/adapter, for peft")
    parser.add_argument(
        "--base", metavar="USER/NAME", help="with --adapter-only: repository of the checkpoint that it belongs to"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the files and what would change in them, and stop; asks nobody"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from linearize.hub.push import push

    options = vars(arguments)
    where = push(options.pop("folder"), options.pop("repo"), **options)
    if not arguments.dry_run:
        print(f"pushed to {where}")
