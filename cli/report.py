"""Show conversions side by side: a table in the terminal, and a page with curves, heat maps and bars.

linearize report runs/gdn                                # also writes runs/gdn/report.html and runs/gdn/report/*.png
linearize report runs/gdn runs/kda --html compared.html  # one page for both, compared/*.png
linearize report runs/gdn evaluated.json timed.json      # with what evaluate and bench wrote with --output
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from linearize.report.sources import Sources

WHOLE = 4
"""Evaluations up to which each is printed as `evaluate` prints it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="folders that `linearize convert` wrote, or JSON of reports"
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="the page, with its pictures in a folder of the same name beside it; none writes neither (default: "
        "report.html in the folder where one is given, else here)",
    )
    parser.add_argument("--output", metavar="FILE", help="write everything the table is made of there as JSON")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="import probes of your own that measurements name as module:Class, from the Python path",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from linearize.report.conversions import report_of, write_json
    from linearize.report.page import check_page, left_out, warnings, write_page
    from linearize.report.sources import read_sources

    page = arguments.html or _place(arguments.paths)
    if page != "none":
        check_page(page)
    sources, trusted = read_sources(arguments.paths), arguments.trust_remote_code
    for told in left_out(sources, trust_remote_code=trusted):
        print(f"left out: {told}", file=sys.stderr)
    for told in warnings(sources):
        print(f"not measured alike: {told}", file=sys.stderr)
    conversions = [model.conversion for model in sources.models]
    tables = [report_of(conversions)] if conversions else []
    tables += _evaluations(sources, trusted)
    tables += [found.table() for found in sources.benches.values()]
    print("\n\n".join(tables))
    if arguments.output:
        write_json(conversions, arguments.output)
        print(f"\nreport written to {arguments.output}")
    if page != "none":
        page, pictures = write_page(sources, page, trust_remote_code=trusted)
        print(f"\npage written to {page}, {len(pictures)} pictures to {page.with_suffix('')}")


def _evaluations(sources: Sources, trusted: bool) -> list[str]:
    """Each evaluation with its probes; many of them as one table."""
    from linearize.evals.table import comparison_table
    from linearize.report import conditions
    from linearize.report.page import evaluated

    if len(sources.evaluations) > WHOLE:
        probes = f"Probes are on the page; of up to {WHOLE} evaluations they are printed too."
        return [f"{comparison_table(list(evaluated(sources).items()))}\n\n{probes}"]
    return [
        f"{name}, measured with {conditions.line(conditions.of_report(report))}\n"
        f"{report.table(trust_remote_code=trusted)}"
        for name, report in sources.evaluations.items()
    ]


def _place(paths: list[str]) -> Path:
    folders = [Path(path) for path in paths if Path(path).is_dir()]
    return (folders[0] if len(folders) == 1 else Path()) / "report.html"
