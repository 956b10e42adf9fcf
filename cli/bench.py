"""Time prefill, decoding and training steps against softmax attention, with cache size and peak memory.

Either a checkpoint, or a model with random weights of a known shape, which needs no download:

  linearize bench --shape llama-3-8b --mixer lolcats --lengths 512,2048,8192
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from linearize.cli._arguments import add_trust, dtype, numbers, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", nargs="?", metavar="PATH", help="folder or hub name of a converted checkpoint")
    parser.add_argument("--shape", metavar="NAME", help="instead of PATH: llama-3-8b, llama-3.2-1b, or a config.json")
    parser.add_argument("--mixer", metavar="NAME", help="mixer of the random model (default: lolcats)")
    parser.add_argument(
        "--lengths",
        type=numbers,
        default=[512, 2048, 8192],
        metavar="N,N",
        help="tokens of the prompts",
    )
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="rows")
    parser.add_argument("--decode-tokens", type=positive, default=32, metavar="N", help="tokens to decode")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="timed runs")
    parser.add_argument(
        "--dtype",
        metavar="NAME",
        help="default: the checkpoint's; random models: bfloat16 on a GPU, else float32",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="default: a GPU if there is one")
    parser.add_argument(
        "--train-length",
        type=int,
        default=1024,
        metavar="N",
        help="tokens per row of the training steps of the recipe's stages; 0 times none",
    )
    parser.add_argument(
        "--drafts",
        type=int,
        default=0,
        metavar="N",
        help="also decode held-out text of the checkpoint's recipe with N tokens drafted at a time, if not 0",
    )
    parser.add_argument("--output", metavar="FILE", help="write the report there as JSON")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from linearize.bench import BenchReport, bench
    from linearize.errors import UserError

    if (arguments.path is None) == (arguments.shape is None):
        raise UserError("give either the PATH of a checkpoint or --shape for random weights")
    if arguments.path and arguments.mixer:
        raise UserError(f"--mixer goes with --shape; {arguments.path} has its own mixers")
    prompts = _prompts(arguments) if arguments.drafts > 0 else None
    model = _model(arguments)

    def measured(report: BenchReport) -> None:
        """Nothing that was measured is lost if the command is stopped."""
        if arguments.output:
            report.to_json(arguments.output)
        what = f"{report.speeds[-1].length:,} tokens"
        if report.steps:
            what = f"a step of {report.steps[-1].stage}"
        elif report.speculations:
            what = "speculative decoding"
        print(f"measured: {what}", file=sys.stderr)

    report = bench(
        model,
        lengths=arguments.lengths,
        batch_size=arguments.batch_size,
        decode_tokens=arguments.decode_tokens,
        repeats=arguments.repeats,
        stages=_stages(arguments, model) if arguments.train_length > 0 else (),
        train_length=arguments.train_length,
        prompts=prompts,
        drafts=arguments.drafts,
        measured=measured,
    )
    print(report.table())
    if arguments.output:
        print(f"\nreport written to {arguments.output}")


def _prompts(arguments: argparse.Namespace) -> Any:
    """Eight pieces of 256 tokens of the text that the checkpoint's recipe measures on, [8, 256]."""
    import torch
    from transformers import AutoTokenizer

    from linearize import Recipe
    from linearize.errors import UserError
    from linearize.evals.held_out import eval_tokens
    from linearize.evals.text import spread_windows

    written = Path(arguments.path or "") / "recipe.yaml"
    if not arguments.path or not written.is_file():
        raise UserError("--drafts decodes text of a checkpoint's recipe; give the folder of a conversion")
    recipe = Recipe.load(written)
    if recipe.evaluation is None:
        raise UserError(f"--drafts needs held-out text, and {written} has no evaluation section")
    text = eval_tokens(recipe.evaluation, AutoTokenizer.from_pretrained(arguments.path), recipe.data)
    return torch.stack([text[start : start + 256] for start in spread_windows(len(text), 256, 8)])


def _stages(arguments: argparse.Namespace, model: Any) -> list:
    """The stages of the checkpoint's recipe, or of the mixer's default one."""
    from linearize import Recipe
    from linearize.hf.folder import recipe_in
    from linearize.preflight import stages_of
    from linearize.registry import known_family

    family = known_family(model.config)
    if family is None:  # such as a native export; `bench` says what it lacks
        return []
    if arguments.path is None:
        return stages_of(Recipe.load(f"default/{arguments.mixer or 'lolcats'}", model="demo").stages, family)
    recipe = recipe_in(Path(arguments.path)) or {}
    return stages_of(recipe.get("stages") or [], family, trusted=False)


def _model(arguments: argparse.Namespace) -> Any:
    from linearize import load
    from linearize.bench_models import random_model
    from linearize.device import default_device

    device = default_device(arguments.device)
    if arguments.path:
        trust = arguments.trust_remote_code
        return load(arguments.path, dtype=arguments.dtype or "auto", device=device, trust_remote_code=trust)[0]
    chosen = arguments.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    return random_model(arguments.shape, arguments.mixer or "lolcats", device=device, dtype=dtype(chosen))
