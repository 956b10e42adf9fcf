"""Show conversions side by side: a table in the terminal, and a page with curves, heat maps and bars.

linearize report runs/gdn                                # also writes runs/gdn/report.html and runs/gdn/report/*.png
linearize report runs/gdn runs/kda --html compared.html  # one page for both, compared/*.png
linearize report runs/gdn evaluated.json timed.json      # with what evaluate and bench wrote with --output
"""

from __future__ import annotations

import argparse
from pathlib import Path

from linearize.cli._arguments import add_trust


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
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from linearize.report.conversions import report_of, write_json
    from linearize.report.page import write_page
    from linearize.report.sources import read_sources

    sources = read_sources(arguments.paths)
    conversions = [model.conversion for model in sources.models]
    tables = [report_of(conversions)] if conversions else []
    tables += [found.table() for found in sources.evaluations.values()]
    tables += [found.table() for found in sources.benches.values()]
    print("\n\n".join(tables))
    if arguments.output:
        write_json(conversions, arguments.output)
        print(f"\nreport written to {arguments.output}")
    if arguments.html != "none":
        page = arguments.html or _place(arguments.paths)
        page, pictures = write_page(sources, page, trust_remote_code=arguments.trust_remote_code)
        print(f"\npage written to {page}, {len(pictures)} pictures to {page.with_suffix('')}")


def _place(paths: list[str]) -> Path:
    folders = [Path(path) for path in paths if Path(path).is_dir()]
    return (folders[0] if len(folders) == 1 else Path()) / "report.html"
