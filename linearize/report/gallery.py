"""Turns views into HTML: pictures in grids, tables below them, and what is too much to be looked at at once closed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from linearize.evals.views import Bars, HeatMap, Lines, Table, View
from linearize.report import html
from linearize.report.figures import Style, is_picture, png, svg

MANY = 8
"""Pictures of one thing, each of another model, up to which they are open."""
LONG = 16
"""Rows of a table up to which it is open below a picture that shows the same."""


class Gallery:
    """Keeps the PNG of every picture that it shows, under a name made of its title."""

    def __init__(self, style: Style):
        self.style = style
        self.pictures: dict[str, bytes] = {}

    def show(self, views: Sequence[View], prefix: str = "") -> str:
        """The views in their order, pictures that follow each other in a grid."""
        shown, below = "", False
        for picture, run in groupby(views, is_picture):
            together = list(run)
            if picture:
                shown += self._pictures(together, prefix)
            else:
                shown += "".join(_table(view, below) for view in together if isinstance(view, Table))
            below = picture
        return shown

    def _pictures(self, views: Sequence[View], prefix: str) -> str:
        shown, grid = "", list[str]()
        for subject, alike in groupby(views, self._subject):
            drawn = [self._figure(view, prefix) for view in alike]
            if len(drawn) <= MANY:
                grid += drawn
                continue
            shown += html.figures(grid) + html.details(f"{subject}, {len(drawn)} pictures", html.figures(drawn))
            grid = []
        return shown + html.figures(grid)

    def _subject(self, view: View) -> str:
        """The title without the model that it is of."""
        return view.title.replace(f": {self.style.owner(view.title)}", "")

    def _figure(self, view: View, prefix: str) -> str:
        assert isinstance(view, Lines | Bars | HeatMap)
        key = re.sub(r"[^a-z0-9]+", "-", f"{prefix} {view.title}".lower()).strip("-")[:80] or "figure"
        while f"{key}.png" in self.pictures:
            key += "-2"
        self.pictures[f"{key}.png"] = png(view, self.style)
        return html.figure(view.title, view.note, svg(view, self.style, key))


def _table(view: Table, below: bool) -> str:
    if not below or len(view.rows) <= LONG:
        return html.table(view)
    return html.details(f"{view.title}, {len(view.rows)} rows", html.table(view, heading=False))
