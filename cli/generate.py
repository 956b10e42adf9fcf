"""Continue a prompt with a checkpoint, token by token on the terminal."""

from __future__ import annotations

import argparse
from contextlib import nullcontext

from linearize.cli._arguments import add_trust, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="folder or hub name of a checkpoint, or a model alias")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="tokens to write")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="sample at this temperature; 0 takes the likeliest token",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling")
    parser.add_argument(
        "--teacher", action="store_true", help="use the source model's softmax attention on the same weights"
    )
    parser.add_argument(
        "--dtype", default="auto", metavar="NAME", help="type of the weights (default: the checkpoint's)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="default: a GPU if there is one")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    import logging

    import torch
    from transformers import TextStreamer

    from linearize import load
    from linearize.device import default_device
    from linearize.errors import UserError
    from linearize.evals.recall_score import padding_id
    from linearize.model_names import resolve_model
    from linearize.swap import swapped, teacher_path

    device = default_device(arguments.device)
    options = {"dtype": arguments.dtype, "device": device, "trust_remote_code": arguments.trust_remote_code}
    model, tokenizer = load(resolve_model(arguments.path), **options)
    if arguments.teacher and not swapped(model):
        raise UserError(f"{arguments.path} has no swapped layers, so --teacher changes nothing; leave it out")
    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(device)
    if not inputs["input_ids"].numel():
        raise UserError("--prompt has no tokens; give some text to continue")
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature}
    torch.manual_seed(arguments.seed)
    logging.getLogger("linearize").setLevel(logging.WARNING)  # or kernels are told between prompt and answer
    with teacher_path(model) if arguments.teacher else nullcontext():
        model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=arguments.max_new_tokens,
            pad_token_id=padding_id(tokenizer),
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            **sampling,
        )
