"""How close each mixer comes to the softmax attention that it replaced, on the same input.

The teacher's hidden states run through the teacher; in each swapped layer the student's attention is given what the
teacher's was given. Compared is what both return, after the output projection: the relative error |s - t| / |t| over
all tokens, the mean cosine of a token's two vectors, and the size |s| / |t|. It is what attention transfer trains
(LoLCATs, arXiv:2410.10254), layer by layer and without what errors below do to the layers above.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch.nn.functional import cosine_similarity
from torch.utils._pytree import tree_map

from linearize.evals.probes.base import DoesNotFit, Probe, ProbeConfig, Rows, Subject, layer_bars
from linearize.evals.views import View
from linearize.schema import Count
from linearize.swap import SwappedAttention, source_weights, student_path, swapped


class TransferErrorConfig(ProbeConfig):
    """Settings."""

    length: Count | None = Field(None, gt=0, description="Tokens per window. Default: the training length.")
    windows: PositiveInt = Field(8, description="Windows of text, evenly spaced over it.")


class TransferError(Probe):
    """Layers that keep their softmax are left out, and so is what adapters or training changed in them."""

    Config = TransferErrorConfig
    needs_teacher = True
    needs_mixers = True

    def rows(self, seq_len: int) -> Rows:
        """The windows."""
        return [(self.config.windows, self.config.length or seq_len)]

    def run(self, subject: Subject) -> dict[str, Any]:
        """`{"tokens", "layers": [{"layer", "error", "cosine", "size"}], "notes"}`.

        Raises:
            DoesNotFit: when the teacher is of another shape than the student.
        """
        assert subject.teacher is not None
        length, notes = subject.fitting(self.config.length or subject.seq_len)
        sums: dict[int, torch.Tensor] = {}
        tokens = 0
        family = next(iter(swapped(subject.model).values())).family
        for ids in subject.batches(length, self.config.windows):
            with subject.teacher() as teacher, _comparing(subject.model, teacher, sums):
                family.base_model(teacher)(input_ids=ids, use_cache=False)
            tokens += ids.numel()
        layers = []
        for layer, found in sorted(sums.items()):
            error, student, reference, cosine = found.tolist()
            assert reference != 0, f"attention of layer {layer} returns zeros"
            layers.append(
                {
                    "layer": layer,
                    "error": (error / reference) ** 0.5,
                    "cosine": cosine / tokens,
                    "size": (student / reference) ** 0.5,
                }
            )
        return {"tokens": tokens, "layers": layers, "notes": notes}

    @classmethod
    def views(cls, results: Mapping[str, dict[str, Any]]) -> Sequence[View]:
        """Bars for each layer."""
        return [
            layer_bars(
                "Error of the attention output",
                "|student - teacher| / |teacher|",
                results,
                lambda at: at["error"],
                "On the teacher's inputs of the layer. 0 is exact, 1 is as far off as returning nothing.",
            ),
            layer_bars(
                "Direction of the attention output",
                "mean cosine",
                results,
                lambda at: at["cosine"],
                "A high cosine with a large error is an output of the right direction and the wrong size.",
            ),
        ]


@contextmanager
def _comparing(model: Any, teacher: Any, sums: dict[int, torch.Tensor]) -> Iterator[None]:
    """Inside the context every attention of the teacher adds to `sums`, by the layer's number: the squared error, the
    squared sizes of student and teacher, and the cosines of all tokens.
    """
    layers = swapped(model)
    family = next(iter(layers.values())).family
    if _size(teacher) != _size(model):
        raise DoesNotFit(
            "transfer_error feeds the student's layers with the teacher's inputs, and teacher and student "
            f"have {_size(teacher)} and {_size(model)} layers and channels; give the model it was converted from as "
            "`teacher`, or leave the probe out"
        )
    places = family.attentions(teacher)
    dtype = None if teacher is model else model.dtype
    hooks = [
        places[name].register_forward_hook(partial(_compare, model, attn, dtype, sums), with_kwargs=True)
        for name, attn in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _compare(
    model: Any,
    attn: SwappedAttention,
    dtype: torch.dtype | None,
    sums: dict[int, torch.Tensor],
    module: Any,
    args: tuple,
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    """`dtype` is the student's, None where it is that of its inputs."""
    call = attn.given(args, kwargs)
    x, position = call.x, call.position
    if dtype is not None:
        x, position = tree_map(lambda t: t.to(dtype) if isinstance(t, torch.Tensor) else t, (x, position))
    with student_path(attn, source_weights(model)):
        heads, _ = attn.heads(x, position, call.batch)
        student = attn.family.output(attn, heads.flatten(-2).to(x.dtype)).double()
    expected = output[0].double()
    found = torch.stack(
        [
            (student - expected).square().sum(),
            student.square().sum(),
            expected.square().sum(),
            cosine_similarity(student, expected, dim=-1).sum(),
        ]
    )
    layer = int(attn.layer_idx)  # type: ignore[arg-type]
    sums[layer] = sums.get(layer, 0) + found.cpu()


def _size(model: Any) -> tuple[int, int]:
    config = model.config.get_text_config()
    return config.num_hidden_layers, config.hidden_size
