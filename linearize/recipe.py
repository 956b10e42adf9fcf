"""The recipe: everything that a conversion does, as strict data from YAML plus `key=value` overrides.

`Recipe.load("lolcats", model="llama-3-8b", overrides=["stages.0.tokens=20M"])` finds a recipe by name or path, applies
the overrides and validates all of it. `recipe.to_yaml()` is the resolved form, which reproduces the run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError, ValidationInfo, field_validator, model_validator

from linearize import plain_yaml
from linearize.data import DataConfig
from linearize.errors import UserError
from linearize.evals.config import EvalConfig
from linearize.families.base import Family
from linearize.inits.calibrated import InitConfig
from linearize.model_names import resolve_model
from linearize.recipe_files import available, find_recipe, override, read_recipe
from linearize.recipe_plugins import mixer_config, resolved, type_of
from linearize.recipe_sections import ExportConfig, KeptConfig, ModelConfig
from linearize.registry import find
from linearize.schema import WITHOUT_EFFECT, Count, Seed, Strict, user_error
from linearize.select.base import Selector
from linearize.stages.base import Stage

LOOKED_AT = 2**20
"""Tokens of a stream that are read at least where the source model is looked at on it."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a recipe came from, as it was asked for. All are equal: recipes with the same settings are."""

    name: str | None = dataclasses.field(default=None, compare=False)
    """Of a shipped recipe, such as default/auto, or of a file; None for one that was put together in Python."""
    shipped: bool = dataclasses.field(default=False, compare=False)
    overrides: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """`key=value` each."""

    @property
    def stem(self) -> str | None:
        """`auto` of the shipped recipe default/auto; None for an author's own."""
        return self.name.rpartition("/")[2] if self.shipped and self.name is not None else None


class Recipe(Strict):
    """A whole conversion."""

    _origin: Origin = PrivateAttr(default_factory=Origin)

    model: ModelConfig
    layers: str | list[int] | dict[str, Any] = Field(
        "all",
        description="Layers to swap: all, a pattern of L (linear) and S (softmax, kept) repeated over the depth, "
        "numbers of layers from 0, or the `type` and settings of a selector, which looks at the model and chooses.",
    )
    kept: KeptConfig = Field(
        default_factory=KeptConfig, description="How the layers that keep their softmax attention see positions."
    )
    mixer: dict[str, Any] = Field(description="`type` names the mixer; the other keys are its own settings.")
    data: DataConfig = Field(description="Training text.")
    tokens: Annotated[Count, Field(gt=0)] | None = Field(
        None,
        exclude=True,
        description="Tokens of all stages together, of which each gets the share that it has by its own; null for what "
        "the stages say.",
    )
    stages: list[dict[str, Any]] = Field(
        [],
        description="Training stages in order; `type` names the stage, the other keys are its own settings.",
    )
    evaluation: EvalConfig | None = Field(
        None, description="What is measured on teacher and student; null for nothing."
    )
    export: ExportConfig = Field(
        default_factory=ExportConfig, json_schema_extra=WITHOUT_EFFECT, description="How the result is written."
    )
    init: InitConfig = Field(default_factory=InitConfig, description="How new tensors get their first values.")
    seed: Seed = Field(0, description="Seed of newly initialised tensors.")

    @field_validator("mixer", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @field_validator("mixer")
    @classmethod
    def _resolve_mixer(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {"type": type_of(value, "mixer"), **dataclasses.asdict(mixer_config(value))}

    @field_validator("layers", mode="before")
    @classmethod
    def _one_of_four(cls, value: Any) -> Any:
        numbers = not isinstance(value, list) or all(isinstance(i, int) for i in value)
        if not isinstance(value, str | list | dict) or not numbers:
            raise ValueError(
                f"must be all, a pattern such as LLLS, numbers of layers, or {{type: window_ablation}}, got {value!r}"
            )
        return value

    @field_validator("layers")
    @classmethod
    def _resolve_layers(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return resolved(find("select", type_of(value, "layers"), Selector).Config, value, "layers")

    @field_validator("stages")
    @classmethod
    def _resolve_stages(cls, value: list[dict[str, Any]], info: ValidationInfo) -> list[dict[str, Any]]:
        stages = []
        for index, settings in enumerate(value):
            where = f"stages.{index}"
            stages.append(resolved(find("stages", type_of(settings, where), Stage).Config, settings, where))
        return _sharing(stages, info.data.get("tokens"))

    @model_validator(mode="after")
    def _stages_find_their_data(self) -> Recipe:
        for index, settings in enumerate(self.stages):
            self._stage_data(settings, f"stages.{index}")
        return self

    def stage_data(self, settings: Mapping[str, Any], where: str = "stage") -> DataConfig:
        """What a stage with these settings trains on: `data`, with the stage's own `data` and `seq_len` over it.

        Raises:
            UserError: for a key or value that does not fit.
        """
        return self._as_far_as_needed(self._stage_data(settings, where))

    def source_data(self) -> DataConfig:
        """What the source model is looked at on, to choose layers and to calibrate mixers: the text of `data` alone.

        A calibration on synthetic recall documents has been seen to slow the learning of recall.
        """
        return self._as_far_as_needed(self._text)

    @property
    def _text(self) -> DataConfig:
        return self.data.model_copy(update={"recall_fraction": 0.0})

    def _as_far_as_needed(self, data: DataConfig) -> DataConfig:
        """`data`, of a stream no more than is looked at, or the longest stage takes that trains on just that.

        Nor of text that recall documents are mixed into: at a share of 0.9 there is ten times as much as of text.
        """
        if not (data.streaming or data.recall_fraction) or data.max_tokens is not None:
            return data
        needed = [LOOKED_AT, self.init.tokens] if data == self._text else []
        for settings in self.stages:
            stage = find("stages", settings["type"], Stage)
            if stage.trains and self._stage_data(settings) == data:
                config = stage.Config.model_validate(settings)
                needed.append(config.trained_tokens(data.seq_len * data.item_rows))
        return data.model_copy(update={"max_tokens": max(needed, default=LOOKED_AT)})

    def _stage_data(self, settings: Mapping[str, Any], where: str = "stage") -> DataConfig:
        own = dict(settings.get("data") or {})
        if "seq_len" in own:
            raise UserError(f"{where}.data.seq_len: a stage has a seq_len of its own; write {where}.seq_len")
        if settings.get("seq_len") is not None:
            own["seq_len"] = settings["seq_len"]
        try:
            return DataConfig.model_validate({**self.data.model_dump(), **own})
        except ValidationError as error:
            raise user_error(error, f"{where}.data", DataConfig.model_fields) from None

    def selector(self, family: type[Family]) -> Selector | None:
        """What chooses the layers of a model of this family; None where the recipe names them."""
        if not isinstance(self.layers, dict):
            return None
        found = find("select", self.layers["type"], Selector)
        return found(found.Config.model_validate(self.layers), family)

    @classmethod
    def load(cls, name: str | Path | None = None, model: str | None = None, overrides: Sequence[str] = ()) -> Recipe:
        """Find, override and validate a recipe.

        Args:
            name: recipe name such as `lolcats`, `demo/lolcats`, or a path to a YAML file. Default: `auto`.
            model: alias, hub name or folder; replaces the recipe's `model.name`.
            overrides: `key.path=value` with values in YAML.

        Raises:
            UserError: unknown recipe, key, mixer, stage or alias, or a value that does not fit.
        """
        path = find_recipe(name, model)
        data = read_recipe(path)
        if model is not None:
            section = data.setdefault("model", {})
            if not isinstance(section, dict):
                raise UserError(f"{path}: model must hold keys such as name, got {section!r}")
            section["name"] = model
        named = [text.partition("=")[0] for text in overrides]
        if "tokens" in named and (own := [name for name in named if re.fullmatch(r"stages\.(\d+|\*)\.tokens", name)]):
            raise UserError(
                f"tokens is a budget that all stages share, so {own[0]} has no say beside it; give one of them"
            )
        for text in overrides:
            override(data, text)
        if "model" not in data:
            raise UserError(f"which model? recipe {path.stem!r} names none; give --model NAME (demo needs no download)")
        recipe = cls.parse(data)
        shipped = next((key for key, file in available().items() if file == path), None)
        recipe._origin = Origin(shipped or path.name, shipped is not None, tuple(overrides))
        return recipe

    @classmethod
    def parse(cls, data: dict[str, Any]) -> Recipe:
        """Validate plain data.

        Raises:
            UserError: with one line per problem.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _readable(error) from None

    @property
    def origin(self) -> Origin:
        """What `load` was asked for."""
        return self._origin

    def resolved_model(self) -> str:
        """The path or hub name that `model.name` stands for."""
        return resolve_model(self.model.name)

    def to_yaml(self) -> str:
        """The resolved recipe, which reproduces the run."""
        return plain_yaml.write(self.model_dump(mode="json"))


def _sharing(stages: list[dict[str, Any]], budget: int | None) -> list[dict[str, Any]]:
    """Stages of `budget` tokens together, whose shares are those of the tokens that they have."""
    if budget is None:
        return stages
    said = [stage["tokens"] for stage in stages if "tokens" in stage]
    if not said:
        raise UserError(f"tokens={budget:,} is shared by the stages that train, and there are none; leave tokens out")
    if budget * min(said) < sum(said):
        least = math.ceil(sum(said) / min(said))
        raise UserError(f"tokens={budget:,} leaves nothing for the shortest stage; give at least {least:,}")
    return [{**s, "tokens": s["tokens"] * budget // sum(said)} if "tokens" in s else s for s in stages]


def _readable(error: ValidationError) -> UserError:
    for problem in error.errors():
        inner = problem.get("ctx", {}).get("error")
        if isinstance(inner, UserError):
            return inner
    sections: dict[str, Any] = {
        "": Recipe,
        "model": ModelConfig,
        "data": DataConfig,
        "evaluation": EvalConfig,
        "export": ExportConfig,
        "init": InitConfig,
        "kept": KeptConfig,
    }
    place = error.errors()[0]["loc"]
    section = sections.get(str(place[0]) if len(place) > 1 else "", Recipe)
    return user_error(error, "", section.model_fields)
