"""The report: one self-contained HTML page that shows what each query was traced to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datasets import Dataset
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hf_forward_inf.report.gallery import heatmap, pictures_of
from hf_forward_inf.utils.rows import LAYOUTS, SENTINEL, text_and_target, text_columns, without_sentinels

SHOWN = 10
"""Candidates shown for each query."""
RISE = "how much an example's loss rises"
SHIFT = "how far the model's prediction for an example moves"
BUDGET_CAPTION = (
    "What each attributor has found after a time, candidates that it has not inspected yet ranked last. Each inspects "
    "candidates at its own measured pace, in one random order; a cascade begins with the best of its first stage."
)


class Ranked(Protocol):
    """What is shown of an attribution."""

    @property
    def queries(self) -> Dataset:
        """The queries, row for row."""
        ...

    @property
    def candidates(self) -> Dataset:
        """The candidates, row for row."""
        ...

    @property
    def method(self) -> str:
        """The attributor's name."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The options that made the scores."""
        ...

    @property
    def details(self) -> Dataset | None:
        """Token by token, for some pairs."""
        ...

    def top(self, query: int, k: int = 10) -> Dataset:
        """Give the best candidates of one query."""
        ...


def write_report(
    path: str | Path,
    attribution: Ranked,
    *,
    proponents: Sequence[Sequence[int]] | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    note: str = "",
    plot: str = "",
    plot_caption: str | None = None,
    title: str | None = None,
    columns: tuple[str, ...] | None = None,
    k: int = SHOWN,
) -> None:
    """Write a page with the best candidates of each query. Everything it shows is escaped.

    Args:
        path (`Path`): The file to write.
        attribution (`Attribution`): What to show.
        proponents (`list[list[int]]`, *optional*): For each query, row numbers of its proponents: they are marked.
        metrics (`dict`, *optional*): Figures by attributor, shown as a table.
        note (`str`, *optional*): What to know of these figures, shown below the table.
        plot (`str`, *optional*): An SVG of our own making ([`plots.budget_plot`]), shown below the table.
        plot_caption (`str`, *optional*): Stands below it. Defaults to that of [`plots.budget_plot`].
        title (`str`, *optional*): Heads the page. Defaults to a question about what the model said or drew.
        columns (`tuple[str, ...]`, *optional*): Columns of input and target texts. Found by [`rows.text_columns`].
        k (`int`, defaults to 10): Candidates shown for each query.
    """
    columns = columns or text_columns(attribution.queries.column_names) or LAYOUTS[0]
    drawn = "image" in attribution.queries.column_names
    details = {(row["query"], row["candidate"]): row for row in attribution.details or []}
    queries = []
    for i, query in enumerate(attribution.queries):
        truth = None if proponents is None else set(proponents[i])
        found = attribution.top(i, k)
        top = float(np.max(found["score"], initial=0.0))
        queries.append(
            {
                "parts": _parts(*text_and_target(query, columns)),
                "pictures": pictures_of(query),
                "proponents": None if truth is None else len(truth),
                "rows": [_shown(row, columns, details.get((i, row["candidate"])), top, truth) for row in found],
            }
        )
    environment = Environment(
        loader=PackageLoader("hf_forward_inf", "report"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("page.html").render(
        title=title or f"Which training examples made the model {'draw' if drawn else 'say'} this?",
        measured=SHIFT if attribution.config.get("measure") == "shift" else RISE + ("" if drawn else " (in nats)"),
        method=attribution.method,
        candidates=attribution.config.get("streamed", len(attribution.candidates)),
        config={name: value for name, value in attribution.config.items() if value is not None and name != "run"},
        metrics=metrics or {},
        figures=sorted({name for row in (metrics or {}).values() for name in row}, key=_figure_order),
        queries=queries,
        note=note,
        plot=Markup(plot),
        plot_caption=plot_caption or BUDGET_CAPTION,
    )
    Path(path).write_text(page, encoding="utf-8")


def _shown(
    row: Mapping[str, Any],
    columns: tuple[str, ...],
    detail: Mapping[str, Any] | None,
    top: float,
    truth: set[int] | None,
) -> dict[str, Any]:
    """What is shown of a candidate."""
    text, target = text_and_target(row, columns)
    on_picture = "image" in row
    terms = [] if on_picture else _heated(detail)
    whole = bool(terms) and text in "".join(piece for piece, _, _ in terms)  # the tokens say it all
    return {
        "rank": row["rank"],
        "score": row["score"],
        "width": max(0.0, 100 * row["score"] / top) if top > 0 else 0.0,
        "parts": [] if whole else _parts(text, target),
        "pictures": pictures_of(row),
        "name": str(row.get("id") or "") if on_picture else "",
        "terms": terms,
        "heat": heatmap(detail) if on_picture else "",
        "proponent": truth is not None and row["candidate"] in truth,
    }


def _heated(detail: Mapping[str, Any] | None) -> list[tuple[str, float, float]]:
    """Tokens with their scores, and how dark each is shown: a share of the highest one."""
    if detail is None:
        return []
    highest = max(map(abs, detail["term_scores"]), default=0.0) or 1.0
    pairs = zip(detail["terms"], detail["term_scores"], strict=True)
    return [(text, score, round(max(0.0, score) / highest, 3)) for text, score in pairs if text]


def _parts(text: str, target: str) -> list[tuple[str, bool]]:
    """Cut a text at its sentinels and fill the target in: pieces, and whether each is the target's."""
    answers = [without_sentinels(span) for span in SENTINEL.split(target)[1:]]
    if not SENTINEL.search(text):
        apart = f"{text} " if text and target else text
        return [piece for piece in ((apart, False), (without_sentinels(target), True)) if piece[0]]
    pieces: list[tuple[str, bool]] = []
    for i, piece in enumerate(SENTINEL.split(text)):
        if i:
            pieces.append((answers[i - 1] if i <= len(answers) else "…", True))
        pieces.append((piece, False))
    return [piece for piece in pieces if piece[0]]


def _figure_order(name: str) -> tuple[int, str, int]:
    kind, _, k = name.partition("@")
    order = ("top1", "top5", "mrr", "mrr_se", "precision", "recall")
    return (order.index(kind) if kind in order else len(order), kind, int(k or 0))
