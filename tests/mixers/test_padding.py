"""Padding and packing through a whole model: wherever padding sits, and however tokens arrive, it is never seen."""

from typing import Any

import pytest
import torch
from mixer_cases import CASES, Case
from ops.op_cases import assert_close, random_splits

from linearize.arguments import cache_of, continued

T, MORE = 72, 6  # longer than the default window and chunk, and several small ones

DOUBLE = 1e-10
"""Relative tolerance in float64, where rounding that a norm magnifies layer by layer does not hide a mistake."""

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_layout = pytest.mark.parametrize("layers", ["LLL", "LSL"])


def tokens(B: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 97, (B, length), generator=torch.Generator().manual_seed(seed))


def masks() -> dict[str, torch.Tensor]:
    """One row [T + MORE] for each place where padding can be; the last MORE tokens are real."""
    rows = {name: torch.ones(T + MORE, dtype=torch.long) for name in ("none", "left", "right", "holes", "both")}
    rows["left"][:30] = 0
    rows["right"][40:T] = 0
    rows["holes"][torch.rand(T + MORE, generator=torch.Generator().manual_seed(0)) < 0.4] = 0
    rows["holes"][T:] = 1
    rows["both"][: T - 3] = rows["both"][T - 2 : T] = 0
    return rows


def feed(model: Any, ids: torch.Tensor, mask: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Logits of tokens that arrive in pieces of these lengths, with one cache."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, logits, end = None, [], 0
    for length in lengths:
        piece, end = slice(end, end + length), end + length
        out = continued(
            model,
            cache,
            input_ids=ids[:, piece],
            attention_mask=mask[:, :end],
            position_ids=positions[:, piece],
        )
        cache = cache_of(out)
        logits.append(out.logits)
    assert end == ids.shape[1]
    return torch.cat(logits, dim=1)


@pytest.fixture
def model(converted: Any, case: Case, layers: str) -> Any:
    """The pico model with the case's mixer; `converted` gives small windows, which default settings undo."""
    defaults = case.mixer_class.Config()
    sizes = {name: getattr(defaults, name) for name in ("window", "chunk_size") if case.has(name)}
    return converted(case.key, layers, settings={**sizes, **case.settings}).double()


@every_case
@every_layout
@torch.no_grad()
def test_padding_anywhere_equals_none(model: Any, case: Case) -> None:
    check_padding(model, DOUBLE)
    if case.key != "composed" and case.tolerance == 1e-5:  # each mixer whose output no norm magnifies, as users run it
        check_padding(model.float(), case.tolerance)


def check_padding(model: Any, tolerance: float) -> None:
    mask, ids = torch.stack(list(masks().values())), tokens(len(masks()), T + MORE)
    alone = [model(row[keep][None]).logits[0] for row, keep in zip(ids, mask.bool(), strict=True)]
    for lengths in (
        [T + MORE],
        [T, MORE],
        [T] + [1] * MORE,
        [*random_splits(T, 0), *random_splits(MORE, 0)],
        [1] * (T + MORE),
    ):
        logits = feed(model, ids, mask, lengths)
        assert logits.isfinite().all()
        assert_close([x[keep] for x, keep in zip(logits, mask.bool(), strict=True)], alone, tolerance)


@every_case
@every_layout
@torch.no_grad()
def test_packed_documents_equal_each_document_alone(model: Any) -> None:
    rows = [[20, 1, 31, 20], [66, 6]]
    ids = tokens(2, 72)
    positions = torch.tensor([[i for n in row for i in range(n)] for row in rows])
    # transformers sees packing, in its softmax layers, only without a cache.
    logits = model(ids, position_ids=positions, use_cache=False).logits
    for row, lengths in enumerate(rows):
        alone = [model(piece[None], use_cache=False).logits[0] for piece in ids[row].split(lengths)]
        assert_close(list(logits[row].split(lengths)), alone, DOUBLE)
    shared = model(ids, position_ids=positions[1:], use_cache=False).logits  # one row of positions serves all
    assert_close([shared], [model(ids, position_ids=positions[1:].expand(2, -1), use_cache=False).logits], DOUBLE)
    assert_close([shared[1]], [logits[1]], DOUBLE)
