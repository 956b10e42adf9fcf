"""The selector contract: from the source model alone, which layers keep their softmax attention.

A recipe asks for one with `layers: {type: <file name>, keep: 0.25, ...}` in the place of a pattern. It runs on the
loaded source, before anything is swapped.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from pydantic import Field, field_validator

from linearize.data import PackedDataset
from linearize.errors import UserError
from linearize.families.base import Family
from linearize.schema import Strict


class SelectorConfig(Strict):
    """Settings of every selector."""

    type: str = Field(description="Which selector: the name of a file in linearize/select, or module:Class.")
    keep: float = Field(
        0.25, gt=0, description="Layers that keep their softmax attention: a share of all below 1, else how many."
    )

    @field_validator("keep", mode="before")
    @classmethod
    def _no_flag(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"must be a share below 1, such as 0.25, or a number of layers, got {value!r}")
        return value

    @field_validator("keep")
    @classmethod
    def _a_share_or_a_number(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"must be a share below 1 or a whole number of layers, got {value}")
        return value

    def count(self, depth: int) -> int:
        """How many of `depth` layers keep their attention; at least one."""
        return int(self.keep) if self.keep >= 1 else max(1, round(self.keep * depth))


@dataclass(frozen=True)
class Round:
    """One round of a choice."""

    scores: dict[int, float]
    """By layer that was looked at: the harm, in nats per predicted token, of losing it beside all lost before."""
    lost: tuple[int, ...]
    """The layers that were given up."""


@dataclass(frozen=True)
class Choice:
    """What a selector found."""

    kept: tuple[int, ...]
    """Layers that keep their softmax attention, in order."""
    rounds: tuple[Round, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return asdict(self)


class Selector:
    """Base class of all selectors. A subclass lives in a file named after its recipe key.

    Args:
        config: an instance of the subclass's `Config`.
        family: the model's architecture.
    """

    Config: ClassVar[type[SelectorConfig]]

    def __init__(self, config: Any, family: type[Family]):
        self.config = config
        self.family = family

    def candidates(self, config: Any) -> list[int]:
        """The layers of a model with this configuration that may keep their attention; by default all."""
        return list(range(config.get_text_config().num_hidden_layers))

    def check(self, config: Any, seq_len: int) -> None:
        """Raise the errors that `choose` would on a model with this configuration and rows of `seq_len` tokens."""
        found, depth = self.candidates(config), config.get_text_config().num_hidden_layers
        wanted = self.config.count(depth)
        if wanted >= depth or wanted > len(found):
            raise UserError(
                f"layers.keep: {self.config.keep:g} would keep {wanted} layers, of {depth} that the model has and "
                f"{len(found)} that {self.config.type} may keep; keep at most {min(depth - 1, len(found))}"
            )

    def provisional(self, config: Any) -> list[int]:
        """Layers to keep in a plan made before the choice: as many, evenly spread over the candidates."""
        found = self.candidates(config)
        wanted = self.config.count(config.get_text_config().num_hidden_layers)
        return [found[(i + 1) * len(found) // wanted - 1] for i in range(wanted)]

    def cost(self, config: Any, seq_len: int) -> str:
        """What `choose` will read, in words, on a model with this configuration; "" where it is not known."""
        return ""

    def choose(self, model: Any, tokenizer: Any, data: PackedDataset) -> Choice:
        """Choose the layers.

        Args:
            model: the source model, in eval mode; as it was afterwards.
            tokenizer: its tokenizer.
            data: rows of training text.
        """
        raise NotImplementedError
