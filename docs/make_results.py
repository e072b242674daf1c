"""Make the tables of README and of the documentation from `docs/results/figures/*.json`.

    python docs/make_results.py                                      # writes the tables into the pages
    python docs/make_results.py --check                              # fails if a page is not up to date
    python docs/make_results.py --add outputs/lds/figures.json lds   # takes over a run's figures first

A page has `<!-- figures: NAME -->` where the table of `figures/NAME.json` belongs, or `<!-- figures: NAME lds mrr -->`
for some of its columns, or `<!-- figures: NAME lds mrr | forward_inf | bm25 -->` for some of its rows, too; the table
goes behind it, up to `<!-- end of figures -->`.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from hf_forward_inf.evaluation.figures import as_markdown

DOCS = Path(__file__).parent
FIGURES = DOCS / "results" / "figures"
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("results/*.md"))]
BLOCK = re.compile(r"(<!-- figures: (\S+)(.*?) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
"""The mark before a table, its name, its columns and rows, and the mark behind it."""


def made(text: str) -> str:
    """Return a page with its tables made from the figures."""

    def table(found: re.Match[str]) -> str:
        figures = json.loads((FIGURES / f"{found[2]}.json").read_text())
        columns, *rows = found[3].split(" | ")
        return f"{found[1]}\n{as_markdown(figures, columns.split(), rows)}\n\n{found[4]}"

    return BLOCK.sub(table, text)


def main(arguments: list[str] | None = None) -> int:
    """Write the tables into the pages, or check that they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; fail if a page is not up to date.")
    parser.add_argument("--add", nargs=2, metavar=("FILE", "NAME"), help="Take over a run's figures under a name.")
    options = parser.parse_args(arguments)
    if options.add:
        shutil.copyfile(options.add[0], FIGURES / f"{options.add[1]}.json")
    stale = {page: text for page in PAGES if (text := made(page.read_text())) != page.read_text()}
    for page, text in stale.items():
        print(f"{page.name} {'is not up to date: run python docs/make_results.py' if options.check else 'written'}")
        if not options.check:
            page.write_text(text)
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
