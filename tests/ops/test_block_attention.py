"""Where `Blocks` puts tokens, and what `block_attention` refuses; its values are tested with the mixers made of it."""

import pytest
import torch

from linearize.ops.block_attention import block_attention
from linearize.ops.blocks import Blocks

SIZE, BACK = 4, 1


def row(seen: int, count: int, columns: int) -> list[int]:
    """Positions + 1 of the tokens in each column, 0 where there is none, for a row `seen` tokens long before."""
    first = (seen // SIZE - BACK) * SIZE
    return [p + 1 if 0 <= p < seen + count else 0 for p in range(first, first + columns)]


@pytest.mark.parametrize(("T", "lengths"), [(1, [1, 1, 0, 1, 1]), (7, [7, 7, 2, 0, 5]), (4, [4, 1, 4, 3, 4])])
def test_tokens_of_rows_at_any_phase_come_to_their_columns(T: int, lengths: list[int]):
    seen, count = torch.tensor([0, 3, 4, 9, 15]), torch.tensor(lengths)
    blocks = Blocks(SIZE, BACK, T, seen, count, fresh=False)
    width = (BACK + blocks.number) * SIZE
    index = torch.arange(T)
    x = torch.where(index < count[:, None], seen[:, None] + index + 1, 0)
    ring = torch.tensor([row(s, 0, blocks.span) for s in seen.tolist()])
    expected = [row(s, n, width) for s, n in zip(seen.tolist(), lengths, strict=True)]
    columns = blocks.columns(x, ring)
    assert columns.tolist() == expected
    assert blocks.exists().tolist() == [[p > 0 for p in places] for places in expected]
    after = [row(s + n, 0, blocks.span) for s, n in zip(seen.tolist(), lengths, strict=True)]
    assert blocks.ring(columns).tolist() == after
    assert blocks.outputs(blocks.queries(x)).tolist() == x.tolist()
    # A column's token is as old as `ages` says.
    bands, queries, ages = blocks.bands(columns), blocks.queries(x), blocks.ages()
    real = (bands[:, :, None] > 0) & blocks.real()[..., None]
    difference = queries[..., None] - bands[:, :, None]
    assert torch.equal(difference[real], ages[:, None].expand_as(difference)[real])
    ends = [
        [(s // SIZE + n + 1) * SIZE <= s + c for n in range(blocks.number)] for s, c in zip(seen, count, strict=True)
    ]
    assert blocks.full().tolist() == ends
    before = [[max(0, (s // SIZE + n - BACK) * SIZE) for n in range(blocks.number)] for s in seen.tolist()]
    assert blocks.before().tolist() == before


def test_fresh_rows_lie_as_rows_that_begin_with_an_empty_ring():
    x, count = torch.arange(1, 11).expand(2, 10), torch.tensor([10, 10])
    fresh, other = (Blocks(SIZE, BACK, 10, torch.zeros(2, dtype=torch.int64), count, fresh=f) for f in (True, False))
    ring = torch.zeros(2, fresh.span, dtype=torch.int64)
    width = (BACK + fresh.number) * SIZE
    assert torch.equal(fresh.columns(x, ring), other.columns(x, ring)[:, :width])
    assert torch.equal(fresh.queries(x), other.queries(x)[:, : fresh.number])
    assert torch.equal(fresh.outputs(fresh.queries(x)), x)


@pytest.mark.parametrize("sizes", [{"block": 0}, {"block": 4, "back": -1}, {"block": 4, "bank": 2}])
def test_impossible_sizes_are_refused(sizes: dict):
    x = torch.randn(1, 3, 1, 4)
    with pytest.raises(ValueError, match="block must be at least 1 token, back and bank at least 0, and a bank needs"):
        block_attention(x, x, x, x, torch.relu, scale=1.0, **sizes)
