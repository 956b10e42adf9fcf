"""The elements of the page: escaped text, tables, figures and the frame with its style sheet; no scripts.

The page loads nothing: its policy (Content-Security-Policy) forbids it even if a name or sample were to hold markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape

from linearize.evals.views import Table
from linearize.report.figures import FONT
from linearize.report.numerals import short

WIDE = 530
"""Points of width from which a figure is too wide for one of two columns."""
PAGE = 1200
"""Pixels of width that a table has on a screen of 1280."""
LETTER, PADDING = 8.6, 26
"""Pixels of a letter of a table, and around a cell."""
BRIEF, LONG = 24, 60
"""Letters from which on a text of a cell may wrap, and from which on it is given room."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #59626d; --back: #fdfdfc; --card: #fff; --line: #dfe2e6;
  --accent: #0b62a8; --kept: #e69f00; --mixer: #0072b2; --under: var(--back); --shade: #5f6b7880; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --soft: #9aa4b0; --back: #14171b; --card: #1b1f25;
  --line: #313841; --accent: #74b9f0; --mixer: #3c9ad6; --shade: #9db2c780; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.55 FONT; }
main, header { max-width: 82rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.2rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .35rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .15rem; font-weight: 600; overflow-wrap: anywhere; }
section > h3 { margin-top: 1.5rem; }
p { margin: .2rem 0 .8rem; max-width: 48rem; } .soft, figcaption p { color: var(--soft); font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: .9rem 0 1.3rem; font-size: .94rem; }
a { color: var(--accent); text-underline-offset: .15em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.tile, figure { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.tile { padding: .7rem .9rem; } .tile b { display: block; font-size: 1.4rem; line-height: 1.25; font-weight: 600; }
.tile span { color: var(--soft); font-size: .84rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 31rem), 1fr)); gap: 1rem;
  grid-auto-flow: dense; margin-bottom: 1rem; }
figure { margin: 0; padding: .9rem 1rem; min-width: 0; } figcaption { margin-bottom: .5rem; }
.wide { grid-column: 1 / -1; } figcaption p { margin: .1rem 0 0; }
figure, details { --under: var(--card); }
.scroll { overflow-x: auto; background: linear-gradient(to right, var(--under) 35%, transparent) 0 0 / 3rem 100% local,
  linear-gradient(to left, var(--under) 35%, transparent) 100% 0 / 3rem 100% local,
  linear-gradient(to right, var(--shade), transparent) 0 0 / .9rem 100%,
  linear-gradient(to left, var(--shade), transparent) 100% 0 / .9rem 100%; background-repeat: no-repeat; }
.scroll svg { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .4rem 0 1rem; }
th, td { padding: .38rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: normal; color: var(--soft); vertical-align: bottom; }
.scroll th:first-child, .scroll td:first-child { position: sticky; left: 0; background: var(--under); z-index: 1; }
td.wrap, td.long { white-space: normal; overflow-wrap: anywhere; } td.wrap { min-width: 9rem; }
td.long { min-width: 18rem; }
@media (max-width: 40rem) { main, header { padding: 0 .8rem; } th, td { padding: .32rem .5rem; }
  td:first-child { white-space: normal; overflow-wrap: break-word; min-width: 6.5rem; max-width: 8rem; }
  td.wrap { min-width: 7rem; } td.long { min-width: 9rem; }
  .tiles { grid-template-columns: 1fr 1fr; } figure { padding: .7rem; } }
th.text, td.text { text-align: left; } td:first-child { font-weight: 600; }
.warn { border-left: .3rem solid var(--kept); background: var(--card); padding: .5rem .9rem; margin: .6rem 0 1rem;
  border-radius: .3rem; font-size: .9rem; overflow-wrap: anywhere; }
.warn ul { margin: .2rem 0; padding-left: 1.2rem; } .warn p { margin: 0; max-width: none; }
.layers { display: inline-flex; gap: 2px; vertical-align: middle; flex-wrap: wrap; }
.layers i { min-width: 1.35rem; padding: 0 .2rem; border-radius: 3px; text-align: center; font-size: .75rem;
  font-weight: 600; line-height: 1.35rem; font-style: normal; color: #fff; background: var(--mixer); }
.layers i.kept { background: var(--kept); color: #16130a; }
.key { display: inline-block; width: .75rem; height: .75rem; border-radius: 3px; margin-right: .5rem; }
details { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem; background: var(--card);
  margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font: .84rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
footer { max-width: 82rem; margin: 2.5rem auto 0; padding: 1rem 1.25rem 2rem; color: var(--soft); font-size: .84rem; }
@media print { body { background: #fff; } figure, .tile { break-inside: avoid; } nav { display: none; } }
""".replace("FONT", FONT)


def document(title: str, lead: str, sections: Sequence[tuple[str, str]], footer: str) -> str:
    """The whole page.

    Args:
        title: text.
        lead: HTML below the heading.
        sections: (heading, HTML); those without HTML are left out.
        footer: text.
    """
    there = [(f"s{i}", heading, body) for i, (heading, body) in enumerate(sections) if body]
    links = "".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading, _ in there)
    bodies = "\n".join(
        f'<section id="{key}"><h2>{escape(heading)}</h2>\n{body}</section>' for key, heading, body in there
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>
{lead}<nav aria-label="Sections">{links}</nav></header>
<main>
{bodies}
</main>
<footer>{escape(footer)}</footer>
</body>
</html>
"""


def paragraph(text: str, soft: bool = False) -> str:
    """A paragraph of plain text; nothing for none."""
    kind = ' class="soft"' if soft else ""
    return f"<p{kind}>{escape(text)}</p>\n" if text else ""


def listed(texts: Sequence[str]) -> str:
    """A list of plain texts; nothing for none."""
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>\n" if texts else ""


def warning(what: str, texts: Sequence[str]) -> str:
    """A box that stands out: a sentence, and a list of plain texts; nothing for none."""
    return f'<div class="warn" role="note">{paragraph(what)}{listed(texts)}</div>\n' if texts else ""


def figure(title: str, note: str, picture: str) -> str:
    """A picture, an `<svg>`, with its heading; the title is its alternative text too. A wide one takes both columns."""
    named = picture.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    start = named.index(">", named.index("<svg ")) + 1
    named = f"{named[:start]}<title>{escape(title)}</title>{named[start:]}"
    kind = ' class="wide"' if float(picture.partition('width="')[2].partition("pt")[0]) > WIDE else ""
    return (
        f"<figure{kind}><figcaption><h3>{escape(title)}</h3>{paragraph(note)}</figcaption>"
        f'<div class="scroll">{named}</div></figure>\n'
    )


def figures(items: Iterable[str]) -> str:
    """A grid of figures; nothing for none."""
    body = "".join(items)
    return f'<div class="figures">{body}</div>\n' if body else ""


def table(view: Table, heading: bool = True) -> str:
    """A table of escaped text and rounded numbers, with its title and note.

    One that is wider than the page has a column for each of its rows where it is narrower so; a box scrolls what still
    is wider, in the shade at its edge.
    """
    above = f"<h3>{escape(view.title)}</h3>\n" if heading else ""
    turned = _turned(view)
    if _width(view) > PAGE and turned is not None and _width(turned) < _width(view):
        view = turned
    kinds = [_kind([row[i] for row in view.rows]) for i in range(len(view.columns))]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(view.columns, kinds, strict=True))
    lines = (map(_cell, row, kinds) for row in view.rows)
    rows = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>\n'
    return above + paragraph(view.note, soft=True) + body


def layers(pattern: str) -> str:
    """A strip with a square for each layer, S for softmax that was kept."""
    kinds = ['<i class="kept">' if letter == "S" else "<i>" for letter in pattern]
    squares = "".join(f"{kind}{i}</i>" for i, kind in enumerate(kinds))
    return f'<span class="layers" style="min-width: min(60vw, {1.5 * len(pattern):.1f}rem)">{squares}</span>'


def tile(value: str, what: str) -> str:
    """One large number and what it is."""
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>'


def details(summary: str, body: str) -> str:
    """Something that opens on a click; `body` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>\n"


def _turned(view: Table) -> Table | None:
    """With a column for each row; None where that makes no fewer, or rows have no names of their own."""
    names = [row[0] for row in view.rows]
    if (
        view.columns[0]
        or len(names) >= len(view.columns)
        or len(set(names)) < len(names)
        or not all(isinstance(name, str) for name in names)
    ):
        return None
    rows = [[column, *(row[i] for row in view.rows)] for i, column in enumerate(view.columns) if i]
    return replace(view, columns=["", *map(str, names)], rows=rows)


def _width(view: Table) -> float:
    """About how many pixels a table takes at least: headings break between words, short cells do not break."""
    words = [max(map(len, name.split()), default=0) for name in view.columns]
    cells = [max((_letters(_text(row[i])) for row in view.rows), default=0) for i in range(len(view.columns))]
    return sum(PADDING + LETTER * max(pair) for pair in zip(words, cells, strict=True))


def _letters(text: str) -> int:
    """Letters of the narrowest line of a cell: the least widths of td.wrap and td.long in the style sheet."""
    return len(text) if len(text) <= BRIEF else 17 if len(text) <= LONG else 33


def _kind(column: Sequence[str | float | None]) -> str:
    """The class of a column: words to the left, numbers to the right; texts that are not brief wrap."""
    texts = [value for value in column if isinstance(value, str)]
    longest = max(map(len, texts), default=0)
    if longest > BRIEF:
        return ' class="text long"' if longest > LONG else ' class="text wrap"'
    return "" if all(text[:1] in "–+-0123456789" for text in texts) else ' class="text"'


def _cell(value: str | float | None, kind: str) -> str:
    return f"<td{kind}>{escape(_text(value))}</td>"


def _text(value: str | float | None) -> str:
    return value if isinstance(value, str) else short(value)
