"""Facts about people, places and things, scattered over ordinary text, from one to three of which the answer follows.

BABILong (arXiv:2406.10149): the first three bAbI tasks (arXiv:1502.05698) in a haystack, with sentences of our own
and the held-out text around them. Task 1: where is a person? 2: where is a thing that somebody took along? 3: where
was it before?
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from linearize.evals.synthetic.items import Puzzle
from linearize.evals.synthetic.probe import SyntheticConfig, SyntheticProbe
from linearize.evals.synthetic.words import WRONG

PEOPLE = ("Anna", "Peter", "Clara", "Henry")
PLACES = ("kitchen", "garden", "office", "bedroom", "cellar", "hallway")
THINGS = ("apple", "lamp", "letter")
MOVES = ("{who} went to the {place}.", "{who} walked to the {place}.", "{who} moved to the {place}.")
TAKES = ("{who} took the {thing}.", "{who} picked up the {thing}.")
DROPS = ("{who} dropped the {thing}.", "{who} put down the {thing}.")


class BabilongConfig(SyntheticConfig):
    """Settings."""

    tasks: list[Annotated[int, Field(ge=1, le=3)]] = Field(
        [1, 2, 3], min_length=1, description="Which tasks: 1, 2, 3 facts that the answer follows from."
    )
    facts: int = Field(10, ge=6, description="Facts in the text, most of them about something else.")


class Babilong(SyntheticProbe):
    """Each task at each length."""

    Config = BabilongConfig
    title = "Facts in a haystack (BABILong)"
    axis = "task"

    def cases(self) -> Sequence[int]:
        """The tasks."""
        return self.config.tasks

    def write(self, rng: random.Random, case: int, size: int) -> Puzzle:
        """Stories are told until one has something to ask; the wrong answers are other places."""
        while not (asked := ASK[case](story := Story(self.config.facts, rng), rng)):
            pass
        question, answer = asked
        wrong = rng.sample([place for place in PLACES if place != answer], WRONG)
        return Puzzle(
            context=[f"\n{sentence}\n" for sentence in story.sentences],
            question=f"\n{question}",
            answer=f" {answer}.",
            wrong=[f" {place}." for place in wrong],
            references=[answer],
        )


class Story:
    """`facts` random things that happen, and where everybody and everything has been."""

    def __init__(self, facts: int, rng: random.Random):
        self.sentences: list[str] = []
        self.been: dict[str, list[str]] = {name: [] for name in (*PEOPLE, *THINGS)}
        self.holder: dict[str, str] = {}
        for _ in range(facts):
            self._happen(rng.choice(PEOPLE), rng)

    def _happen(self, who: str, rng: random.Random) -> None:
        """`who` drops a thing, takes one that is there or has not been seen yet, or goes to another place."""
        here = self.been[who][-1:]
        held = [thing for thing, holder in self.holder.items() if holder == who]
        free = [t for t in THINGS if here and t not in self.holder and (not self.been[t] or self.been[t][-1:] == here)]
        if held and rng.random() < 0.2:
            thing = rng.choice(held)
            del self.holder[thing]
            self.sentences.append(rng.choice(DROPS).format(who=who, thing=thing))
        elif free and rng.random() < 0.5:
            thing = rng.choice(free)
            self.holder[thing] = who
            self.been[thing] = self.been[thing] or here
            self.sentences.append(rng.choice(TAKES).format(who=who, thing=thing))
        else:
            place = rng.choice([place for place in PLACES if [place] != here])
            for name in (who, *held):
                self.been[name].append(place)
            self.sentences.append(rng.choice(MOVES).format(who=who, place=place))


def _where_is_a_person(story: Story, rng: random.Random) -> tuple[str, str]:
    who = rng.choice([person for person in PEOPLE if story.been[person]])
    return f"Where is {who}? {who} is in the", story.been[who][-1]


def _where_is_a_thing(story: Story, rng: random.Random) -> tuple[str, str] | None:
    carried = [thing for thing in THINGS if len(story.been[thing]) > 1]
    if not carried:
        return None
    thing = rng.choice(carried)
    return f"Where is the {thing}? The {thing} is in the", story.been[thing][-1]


def _where_was_a_thing(story: Story, rng: random.Random) -> tuple[str, str] | None:
    """Before its last place, if it has been there once only."""
    carried = [t for t in THINGS if len(story.been[t]) > 2 and story.been[t].count(story.been[t][-1]) == 1]
    if not carried:
        return None
    thing = rng.choice(carried)
    before, last = story.been[thing][-2:]
    question = f"Where was the {thing} before it was in the {last}? Before the {last}, the {thing} was in the"
    return question, before


ASK = {1: _where_is_a_person, 2: _where_is_a_thing, 3: _where_was_a_thing}
