"""Values that parameters had at an earlier time, so that a model in training can still be what it was then.

A model whose q_proj has been fine-tuned no longer computes the source's attention, whichever path its layers take.
Stages therefore keep what they are about to change, and `linearize.swap.teacher_path` puts it back while it lasts. A
stage whose loss compares with its own beginning keeps a snapshot of its own. Only changed tensors are held twice, and
only where something needs the earlier model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Snapshot:
    """Parameters that training changes, with the values that they had before it.

    Contexts of several snapshots may be nested; those inside must end first.
    """

    def __init__(self) -> None:
        self._other: dict[nn.Parameter, torch.Tensor] = {}
        self.active = False
        """Whether the parameters hold the kept values at the moment."""

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Remember the present values of those that have none yet; call it before the first change."""
        assert not self.active
        for p in parameters:
            if p not in self._other:
                self._other[p] = p.data.clone()

    def kept(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The value that was kept of a parameter; None for one that has not changed."""
        assert not self.active
        return self._other.get(parameter)

    def match_types(self) -> None:
        """Give each kept value the type that its parameter has now."""
        assert not self.active
        for p, other in self._other.items():
            self._other[p] = other.to(p.dtype)

    @contextmanager
    def as_kept(self) -> Iterator[None]:
        """Inside the context the parameters hold the kept values; nested uses do nothing more."""
        with self._set(True):
            yield

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """Inside the context, and inside `as_kept`, they hold the trained values again."""
        with self._set(False):
            yield

    @contextmanager
    def _set(self, active: bool) -> Iterator[None]:
        before = self.active
        self._switch(active)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, active: bool) -> None:
        if active == self.active:
            return
        for p, other in self._other.items():
            p.data, self._other[p] = other, p.data
        torch.clear_autocast_cache()  # it holds casts of what the parameters were before
        self.active = active
