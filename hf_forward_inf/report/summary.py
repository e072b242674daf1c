"""A result as a few lines of text, for the terminal and the notebook."""

from typing import TYPE_CHECKING

from hf_forward_inf.report.lines import classes_of, lines
from hf_forward_inf.report.texts import shortened

if TYPE_CHECKING:
    from hf_forward_inf.report.page import Ranked

QUERIES, ROWS, WIDTH = 3, 3, 88
"""Queries and rows that are shown, and the longest line of a text."""


def as_text(found: "Ranked") -> str:
    """Return what was traced, and each query's verdict and best rows."""
    kept = "all scores" if found.indices is None else f"top {found.scores.shape[1]}"
    head = f"Attribution({found.method}: {len(found.queries)} queries x {found.total:,} candidates, {kept})"
    shown = [line for i in range(min(QUERIES, len(found.queries))) for line in _query(found, i)]
    more = len(found.queries) - QUERIES
    return "\n".join(
        [head, *shown, *([f"... and {more} more queries: [i] shows one, to_html(path) all."] if more > 0 else [])]
    )


def _query(found: "Ranked", i: int) -> list[str]:
    query = lines(found.queries.select([i]), classes_of(found.candidates))[0]
    said = f" → {shortened(query.said, WIDTH // 2)}" if query.said else ""
    shown = [f"{i}. {shortened(query.asked, WIDTH)}{said}", f"   {found.verdict(i)}"]
    for one in lines(found.top(i, ROWS)):
        row, text = one.row, shortened(one.text, WIDTH)
        level = {"strong": "strong", "some": "some  "}.get(row.get("level") or "", "      ")
        shown.append(f"   {row['rank']}. {level} {row['score']:>9.4g}  row {row['candidate']}: {text}")
    return shown
