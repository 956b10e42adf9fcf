"""Whether the examples that prompts of tasks shall have are there, and fit the model, before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linearize.errors import UserError
from linearize.hf.load import load_config, load_tokenizer

PROMPTS = 8
"""Prompts of a task that are looked at."""


@dataclass(frozen=True)
class Room:
    """What prompts have to fit into."""

    tokenizer: Any
    positions: int | None
    """Tokens that the model reads; the harness cuts the beginning of what is longer. None where nothing says it."""


def room_of(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Room:
    """The room of a model, from its configuration and tokenizer; errors as `linearize.load`."""
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    config = load_config(name, **where).get_text_config()
    return Room(load_tokenizer(name, **where), getattr(config, "max_position_embeddings", None))


def check_examples(task: Any, num_fewshot: int, room: Room | None) -> None:
    """Raise a UserError where a task of the harness cannot put so many examples into its prompts.

    Args:
        task: a task of the harness; its random numbers are drawn from.
        num_fewshot: as given to the harness, which ignores it where a task says 0.
        room: what prompts have to fit into; None does not look at their length.
    """
    told = task.config
    if num_fewshot == 0 or told.num_fewshot == 0:
        return
    task.set_fewshot_seed(seed=0)
    prompts: list[str] = []
    for doc, _ in zip(task.eval_docs, range(PROMPTS), strict=False):
        try:
            prompt = task.fewshot_context(doc, num_fewshot)
        except (ValueError, AssertionError) as error:
            if not is_short_of_examples(error):
                raise
            raise UserError(
                f"num_fewshot: task {told.task} has fewer questions to take examples from than the {num_fewshot} that "
                "its prompts shall have; give a smaller num_fewshot, or leave the task out"
            ) from error
        prompts.append(prompt if isinstance(prompt, str) else max(prompt, key=len))
    if room is None or room.positions is None or not prompts or told.output_type == "loglikelihood_rolling":
        return  # what reads whole texts has no prompts
    shortest = min(len(room.tokenizer(prompt)["input_ids"]) for prompt in prompts)
    if shortest > room.positions:
        raise UserError(
            f"num_fewshot: with {num_fewshot} examples the prompts of task {told.task} have {shortest:,} tokens or "
            f"more, and the model reads {room.positions:,}, so that examples would be cut off; give a smaller "
            "num_fewshot, or leave the task out"
        )


def is_short_of_examples(error: Exception) -> bool:
    """Whether the harness says that there are fewer questions than examples, as each of its samplers does."""
    said = ("Sample larger than population", "fewshot samples requested exceeds", "no documents available for sampling")
    return any(words in str(error) for words in said)
