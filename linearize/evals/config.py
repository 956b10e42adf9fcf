"""Settings of the measurements between the stages of a conversion: the `evaluation:` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from linearize.evals.probe_groups import ungrouped
from linearize.evals.probes.base import probe_of
from linearize.schema import WITHOUT_EFFECT, Strict


class EvalConfig(Strict):
    """What is measured on the teacher, the untrained student and the student after each stage."""

    text: str | None = Field(
        None,
        description="Held-out text: `demo`, a file or a hub dataset, like `data.source`, its default.",
    )
    split: str = Field("dev", description="Split of the text source that the losses are taken on.")
    lengths: list[PositiveInt] = Field(
        default_factory=list, description="Context lengths of the loss in tokens; `data.seq_len` if empty."
    )
    windows: PositiveInt = Field(16, description="Windows of text scored at each length, evenly spaced over the text.")
    recall: bool | list[tuple[PositiveInt, PositiveInt]] = Field(
        True,
        description="Synthetic recall: a list of [facts, tokens between fact and question], true for the "
        "usual five cases, false for none.",
    )
    recall_items: PositiveInt = Field(16, description="Questions per recall case.")
    divergence: bool = Field(
        True,
        description="Also compare the student's predictions with the teacher's, for which tensors that training "
        "changes are held twice.",
    )
    between: bool = Field(
        True,
        description="Measure the student before training and after each stage; false: teacher and finished student.",
    )
    branches: bool = Field(True, description="Also take the losses with each branch of the mixers switched off.")
    tasks: list[str] = Field(
        default_factory=list, description="lm-evaluation-harness tasks, or groups such as commonsense and mmlu."
    )
    num_fewshot: NonNegativeInt | None = Field(
        None, description="Examples in the prompts of tasks; each task's own choice if not set."
    )
    limit: PositiveInt | None = Field(None, description="Questions per task; all if not set.")
    probes: list[dict[str, Any]] = Field(
        default_factory=list,
        description="Further measurements: names of probes or of groups, or the `type` and settings of one.",
    )
    sample_prompt: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Prompt that the model continues greedily; none if not set."
    )
    sample_tokens: PositiveInt = Field(48, description="Tokens of that continuation.")
    batch_size: PositiveInt | Literal["auto"] = Field(
        4,
        json_schema_extra=WITHOUT_EFFECT,
        description="Rows per forward; changes speed and memory, not results. `auto`: tasks take what memory holds, "
        "other measurements 4.",
    )

    @property
    def rows(self) -> int:
        """Rows per forward of measurements that do not find their batch size themselves."""
        return 4 if self.batch_size == "auto" else self.batch_size

    @field_validator("probes", mode="before")
    @classmethod
    def _resolve_probes(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError(f"must be a list of probes, such as [kl_by_position], got {value!r}")
        probes = [probe_of(settings, f"probes.{index}") for index, settings in enumerate(ungrouped(value))]
        return [probe.config.model_dump(mode="json") for probe in probes]
