"""Blocks of tokens at fixed positions of their row, when the rows of a batch may be anywhere in a block.

The tokens of a row are cut into blocks of `size`, counted from the row's first token. A ring holds the current block so
far and the `back` blocks before it; `Blocks` puts the tokens of a call behind it, so that the blocks of all rows begin
together, and gives each query the band of tokens that its block can see.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from linearize.ops.layout import shifted


@dataclass(frozen=True)
class Blocks:
    """Where the T tokens of a call lie. Columns are `(back + N) size` places: `back` older blocks, then N blocks, the
    first of which is the block that each row was in; a band is the `(back + 1) size` columns up to the end of a block.

    A call of one token keeps its query where it is, as the only one of its block: c = 1 instead of c = size.
    """

    size: int
    """Tokens in a block."""
    back: int
    """Blocks before the current one that the ring holds and the band shows."""
    length: int
    """T, padding included."""
    seen: torch.Tensor
    """[B] int64, tokens of the row before the call."""
    count: torch.Tensor
    """[B] int64, real tokens of the row in the call; they come first."""
    fresh: bool
    """Whether all rows begin with the call, so that nothing has to move."""

    @property
    def number(self) -> int:
        """N: enough blocks for a row that begins at the last place of one."""
        return -(-(self.length + (0 if self.fresh else self.size - 1)) // self.size)

    @property
    def span(self) -> int:
        """Columns of a band, and tokens of a ring."""
        return (self.back + 1) * self.size

    @property
    def phase(self) -> torch.Tensor:
        """[B] tokens of the current block before the call."""
        return self.seen % self.size

    @property
    def _single(self) -> bool:
        return self.length == 1

    def carried(self, ring: torch.Tensor) -> torch.Tensor:
        """The ring `[B, span, ...]` in its columns, zeros behind it."""
        return F.pad(ring, (0, 0) * (ring.dim() - 2) + (0, (self.number - 1) * self.size))

    def columns(self, x: torch.Tensor, ring: torch.Tensor) -> torch.Tensor:
        """The ring's tokens and the call's x `[B, T, ...]`, zero at padding, in their columns."""
        if self.fresh:
            behind = self.number * self.size - self.length
            return F.pad(x, (0, 0) * (x.dim() - 2) + (self.back * self.size, behind))
        first = -self.phase - self.back * self.size
        return shifted(x, first, (self.back + self.number) * self.size) + self.carried(ring.to(x.dtype))

    def ring(self, columns: torch.Tensor) -> torch.Tensor:
        """The ring after the call: a block that has become full is an older one, and the current one is empty."""
        return shifted(columns, (self.phase + self.count) // self.size * self.size, self.span)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """x `[B, T, ...]` of the call -> `[B, N, c, ...]`, zeros where the call has no token."""
        if self._single:
            return x.unsqueeze(1)
        places = self.number * self.size
        if self.fresh:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, places - self.length))
        else:
            x = shifted(x, -self.phase, places)
        return x.unflatten(1, (self.number, self.size))

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """What `queries` did, undone: `[B, N, c, ...]` -> `[B, T, ...]`."""
        x = x.flatten(1, 2)
        return x[:, : self.length] if self.fresh or self._single else shifted(x, self.phase, self.length)

    def bands(self, columns: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """A view with the columns at `dim` as N bands, each with its span as the last dimension."""
        return columns.unfold(dim, self.span, self.size)

    def exists(self) -> torch.Tensor:
        """Which columns hold a token `[B, columns]`."""
        place = torch.arange((self.back + self.number) * self.size, device=self.seen.device) - self.back * self.size
        begin = self.phase - self.seen  # place of the row's first token
        return (place >= begin[:, None]) & (place < (self.phase + self.count)[:, None])

    def real(self) -> torch.Tensor:
        """Which places of `queries` hold a real token of the call `[B, N, c]`."""
        index = torch.arange(self.length, device=self.seen.device)
        return self.queries((index < self.count[:, None]).long()) > 0

    def ages(self) -> torch.Tensor:
        """How many tokens each column of the band lies before the query, negative after it: `[B or 1, c, span]`."""
        place = self.phase[:, None] if self._single else torch.arange(self.size, device=self.seen.device)[None]
        return place[..., None] + self.back * self.size - torch.arange(self.span, device=self.seen.device)

    def full(self) -> torch.Tensor:
        """Which blocks have their last token when the call ends `[B, N]`."""
        ends = torch.arange(1, self.number + 1, device=self.seen.device) * self.size
        return ends <= (self.phase + self.count)[:, None]

    def before(self) -> torch.Tensor:
        """Tokens of the row before the band of each block `[B, N]`: all of them have left it."""
        index = torch.arange(self.number, device=self.seen.device) - self.back
        return ((self.seen // self.size)[:, None] + index).clamp(min=0) * self.size
