"""The measurements of one conversion: teacher, untrained student, and the student after each stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from linearize.errors import write_whole
from linearize.evals.held_out import check_text, eval_tokens
from linearize.evals.measure import Measurement, measure
from linearize.training.processes import is_main


class Points:
    """The measurements of one conversion, kept on disk so that a resumed run does not repeat them."""

    def __init__(self, path: Path, recipe: Any, tokenizer: Any, say: Callable):
        self.path, self.recipe, self.tokenizer, self.say = path, recipe, tokenizer, say
        self.tokens, self.seconds = 0, 0.0
        self.text: torch.Tensor | None = None
        saved = json.loads(path.read_text()) if path.exists() else []
        self.taken: dict[str, Measurement] = {name: Measurement.from_dict(values) for name, values in saved}

    def read(self) -> None:
        """Read the held-out text, which needs no model, unless nothing is to be measured on it.

        Raises:
            UserError: when it cannot be read, or is too short.
        """
        config, data = self.recipe.evaluation, self.recipe.data
        if config is None or "teacher" in self.taken:  # then it was long enough
            return
        self.text = eval_tokens(config, self.tokenizer, data)
        check_text(config, data, config.lengths or [data.seq_len], len(self.text))

    def add_training(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds

    def take(self, name: str, model: Any, *, between: bool = False) -> None:
        """Measure `model` unless the recipe asks for nothing or an interrupted run has measured it already.

        `between` says that it is neither the teacher nor the finished student, which some recipes leave out.
        """
        config = self.recipe.evaluation
        if config is None or name in self.taken or (between and not config.between):
            return
        self.say(f"measuring: {name}")
        if self.text is None:
            self.text = eval_tokens(config, self.tokenizer, self.recipe.data)
        options = {"token_ids": self.text, "seq_len": self.recipe.data.seq_len, "has_teacher": True}
        found = measure(model, self.tokenizer, config, **options)
        found.tokens, found.seconds = self.tokens, self.seconds
        self.taken[name] = found
        if not is_main():
            return
        write_whole(self.path, json.dumps([(n, m.to_dict()) for n, m in self.taken.items()], indent=1))
