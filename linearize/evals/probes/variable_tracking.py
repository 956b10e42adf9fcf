"""Variable tracking: chains of assignments, `VAR B = VAR A`, over the text; which variables have a given value?

RULER's multi-hop task (arXiv:2404.06654, section 3). Two chains stand in the text rather than RULER's one, so that a
model which names every variable it has seen is wrong by likelihood; the score is the share of the variables named, as
RULER's.
"""

from __future__ import annotations

import random
from typing import Any

from pydantic import Field

from linearize.evals.synthetic.items import Puzzle
from linearize.evals.synthetic.probe import SyntheticConfig, SyntheticProbe
from linearize.evals.synthetic.words import WRONG, listed, names, numbers, one_changed


class VariableTrackingConfig(SyntheticConfig):
    """Settings."""

    hops: int = Field(4, ge=1, description="Assignments from variable to variable in a chain; RULER: 4.")
    chains: int = Field(2, ge=1, description="Chains, one of which is asked; RULER: 1.")


class VariableTracking(SyntheticProbe):
    """All variables of one chain, spread over the text."""

    Config = VariableTrackingConfig
    title = "Variable tracking"

    def write(self, rng: random.Random, case: Any, size: int) -> Puzzle:
        """Chains interleaved at random, each in its order; a wrong answer has one variable of another."""
        n = self.config.hops + 1
        drawn = names(n * self.config.chains + WRONG, rng)
        chains = [drawn[i * n : (i + 1) * n] for i in range(self.config.chains)]
        values = numbers(len(chains), rng)
        turns = [c for c in range(len(chains)) for _ in range(n)]
        rng.shuffle(turns)
        done, context = [0] * len(chains), []
        for c in turns:
            of = values[c] if done[c] == 0 else f"VAR {chains[c][done[c] - 1]}"
            context.append(f"\nVAR {chains[c][done[c]]} = {of}\n")
            done[c] += 1
        others = [name for chain in chains[1:] for name in chain] or drawn[n:]
        return Puzzle(
            context=context,
            question=f"\nWhich variables have the value {values[0]}? The variables with the value {values[0]} are",
            answer=f" {listed(chains[0])}.",
            wrong=[f" {listed(wrong)}." for wrong in one_changed(chains[0], others, rng)],
            references=chains[0],
        )
