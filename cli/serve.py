"""Serve a checkpoint over HTTP, with the OpenAI-style server of transformers (completions, chat, streaming).

  linearize serve my-model --port 8000

It needs fastapi, uvicorn and openai: pip install "transformers[serving]"
"""

from __future__ import annotations

import argparse

from linearize.cli._arguments import add_trust, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="folder or hub name of a checkpoint, or a model alias")
    parser.add_argument("--host", default="localhost", metavar="NAME", help="address to listen on")
    parser.add_argument("--port", type=positive, default=8000, metavar="N", help="port to listen on")
    parser.add_argument("--dtype", default="auto", metavar="NAME", help="type of the weights (default: as saved)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="default: a GPU if there is one")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from transformers.utils.import_utils import is_serve_available

    from linearize.device import default_device
    from linearize.errors import UserError
    from linearize.hf.auto import trusting
    from linearize.hf.serve import expose
    from linearize.model_names import resolve_model

    if not is_serve_available():
        raise UserError('the server needs packages that are not installed; run: pip install "transformers[serving]"')
    from transformers.cli.serve import Serve

    path = resolve_model(arguments.path)
    expose(path, trust_remote_code=arguments.trust_remote_code)
    with trusting(arguments.trust_remote_code):
        Serve(
            force_model=path,
            host=arguments.host,
            port=arguments.port,
            dtype=arguments.dtype,
            device=default_device(arguments.device),
            trust_remote_code=arguments.trust_remote_code,
        )
