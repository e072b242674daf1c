"""A result as a few lines of text, for the terminal and the notebook."""

from typing import TYPE_CHECKING, Any

from datasets import Dataset

from hf_forward_inf.report.texts import answer, plain, shortened

if TYPE_CHECKING:
    from hf_forward_inf.report.page import Ranked

QUERIES, ROWS, WIDTH = 3, 3, 88
"""Queries and rows that are shown, and the longest line of a text."""


def as_text(found: "Ranked") -> str:
    """Return what was traced, and each query's verdict and best rows."""
    kept = "all scores" if found.indices is None else f"top {found.scores.shape[1]}"
    lines = [f"Attribution({found.method}: {len(found.queries)} queries x {found.total:,} candidates, {kept})"]
    for i in range(min(QUERIES, len(found.queries))):
        lines += _query(found, i)
    if len(found.queries) > QUERIES:
        lines.append(f"... and {len(found.queries) - QUERIES} more queries: [i] shows one, to_html(path) all.")
    return "\n".join(lines)


def _query(found: "Ranked", i: int) -> list[str]:
    row = readable(found.queries, i)
    said, text = answer(row), shortened(plain(row), WIDTH)
    lines = [f"{i}. {text}" + (f"  <- {shortened(said, WIDTH // 2)}" if said and said != text else "")]
    lines.append(f"   {found.verdict(i)}")
    for one in best_rows(found, i, ROWS):
        level = {"strong": "strong", "some": "some  "}.get(one.get("level") or "", "      ")
        lines.append(
            f"   {one['rank']}. {level} {one['score']:>9.4g}  row {one['candidate']}: {shortened(plain(one), WIDTH)}"
        )
    return lines


def best_rows(found: "Ranked", i: int, k: int) -> list[dict[str, Any]]:
    """Return the best k rows of a query as [`Attribution.top`] does, without pictures."""
    rows = found.top(i, k)
    return [readable(rows, place) for place in range(len(rows))]


def readable(rows: Dataset, i: int) -> dict[str, Any]:
    """Return a row without its pictures, none of which is decoded."""
    kept = [name for name, kind in rows.features.items() if "Image(" not in str(kind)]
    return {**rows.select_columns(kept)[i]} if kept else {}
