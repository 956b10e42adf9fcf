"""Sets the gates and the size of any mixer from what the teacher's attention does, before any training.

`calibrate(model, ids)` runs the teacher over a few thousand tokens and measures, per layer and query head, how far and
how sharply it attends; how far beyond the mixer's window, where it has one, for the recurrent branch is there for what
the window does not reach. Every part of a mixer that has a decay or a write strength sets it from that; then the
recurrent branch gets the factor per head that brings the layer's output closest to the teacher's. After
Taylor-Calibrate (2026, arXiv:2606.16429), for any gated mixer instead of Gated DeltaNet alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from linearize.errors import UserError
from linearize.mixers.parts.base import Calibration
from linearize.schema import Count, Strict
from linearize.swap import Call, SwappedAttention, swapped
from linearize.teacher import See, run_teacher, teacher_logits

Inputs = Mapping[str, torch.Tensor]


class InitConfig(Strict):
    """How new tensors get their first values."""

    type: Literal["declared", "calibrated"] = Field(
        "declared",
        description="declared: what each mixer names; calibrated: gates and output size then set from the teacher.",
    )
    tokens: Count = Field(8192, gt=0, description="Training tokens that a calibration measures on.")


@torch.no_grad()
def calibrate(model: Any, batches: Sequence[Inputs]) -> dict[str, Calibration]:
    """Calibrate every mixer of `model` in place.

    Args:
        model: a swapped model whose mixers have their declared initial values.
        batches: inputs of the base model: input_ids [B, T], and where they apply position_ids and attention_mask.

    Returns:
        What was measured, by the full name of the attention module.
    """
    layers = swapped(model)
    sums: dict[str, torch.Tensor] = {}
    tokens = dict.fromkeys(layers, 0)

    def measure(name: str, attn: SwappedAttention, call: Call, *_: torch.Tensor) -> None:
        mask = call.batch.mask
        count = call.x.shape[:2].numel() if mask is None else int(mask.sum())
        if not count:
            return
        sums[name] = sums.get(name, 0) + torch.stack(attention_statistics(attn, call))
        tokens[name] += count

    watch(model, batches, measure)
    if not all(tokens.values()):
        raise UserError("the calibration got no tokens: every one of them is padding; give it other rows")
    found = {}
    for name, attn in layers.items():
        reach, mass, entropy = sums[name]
        distance = torch.where(mass > 0, reach / mass.clamp_min(1e-30), attn.mixer.exact)
        found[name] = Calibration(distance, entropy / tokens[name])
        attn.mixer.calibrate(found[name])
    match_outputs(model, batches)
    return found


@torch.no_grad()
def match_outputs(model: Any, batches: Sequence[Inputs]) -> None:
    """Set the factor per head of each recurrent branch by least squares on the teacher's head outputs.

    A layer's output is affine in the factor c: y(c) = y(0) + c (y(1) - y(0)), so c = <y* - y(0), d> / <d, d>, d = y(1)
    - y(0).
    """
    sums: dict[str, list[torch.Tensor]] = {}

    def collect(name: str, attn: SwappedAttention, call: Call, heads: torch.Tensor, _: torch.Tensor) -> None:
        scale = attn.mixer.output_scale
        if scale is None:
            return
        outputs = []
        for value in (0.0, 1.0):
            scale.fill_(value)
            y = attn.heads(call.x, call.position, call.batch)[0]
            outputs.append(y.double())
        teacher, real = heads.view_as(outputs[0]).double(), call.batch.real
        without, direction = outputs[0], outputs[1] - outputs[0]
        if real is not None:
            teacher, without, direction = teacher[real], without[real], direction[real]  # [tokens, Hq, V]
        per_head = [d for d in range(teacher.ndim) if d != teacher.ndim - 2]
        found = [((teacher - without) * direction).sum(per_head), direction.square().sum(per_head)]
        sums[name] = [a + b for a, b in zip(sums[name], found, strict=True)] if name in sums else found

    watch(model, batches, collect)
    for name, attn in swapped(model).items():
        if attn.mixer.output_scale is not None:
            product, square = sums[name]
            attn.mixer.output_scale.copy_(torch.where(square > 0, product / square.clamp_min(1e-30), 1.0))


def watch(model: Any, batches: Sequence[Inputs], see: See) -> None:
    """Run the teacher over batches; see `linearize.teacher.run_teacher`."""
    for batch in batches:
        run_teacher(model, {k: v.to(model.device) for k, v in batch.items()}, see)


def attention_statistics(attn: SwappedAttention, call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What softmax attention does on what a layer was given; three sums over all real queries, each [Hq].

    Queries are taken in blocks, so memory is that of B x Hq x 256 x T weights. Documents are told apart, and padding is
    left out, wherever it is.

    Returns:
        reach: weight times distance in tokens, of what lies beyond the mixer's window.
        mass: the weight alone of the same.
        entropy: normalised entropy of all weights.
    """
    x, batch = call.x, call.batch
    tokens = x.shape[1]
    place = torch.arange(tokens, device=x.device)
    real = x.new_ones(x.shape[:2], dtype=torch.bool) if batch.mask is None else batch.mask
    reach, mass, entropy = torch.zeros(3, attn.mixer.shape.heads, device=x.device)
    for start in range(0, tokens, 256):
        block = slice(start, start + 256)
        age = (place[block, None] - place[None, :]).abs()
        logits = teacher_logits(attn, call, block)
        seen = logits[:, :1].isfinite()
        logs = logits.log_softmax(-1)
        weights, counted = logs.exp(), real[:, None, block].float()
        far = weights * (age >= attn.mixer.exact)
        reach += ((far * age).sum(-1) * counted).sum((0, 2))
        mass += (far.sum(-1) * counted).sum((0, 2))
        nats = -(weights * logs.masked_fill(~seen, 0.0)).sum(-1)
        visible = seen.sum(-1)
        spread = torch.where(visible > 1, nats / visible.clamp_min(2).log(), 0.0)  # one visible token has no spread
        entropy += (spread * counted).sum((0, 2))
    return reach, mass, entropy
