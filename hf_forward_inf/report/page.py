"""The page: an attribution's queries with their best candidates, as one HTML file that loads nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datasets import Dataset
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hf_forward_inf.report.gallery import heatmap, pictures_of
from hf_forward_inf.scores.levels import Background
from hf_forward_inf.utils.rows import LAYOUTS, SENTINEL, rather_than, text_and_target, text_columns, without_sentinels

CAPTIONS = (None, ("caption",), ("text",))
"""Columns of texts beside pictures that a model draws or classifies; others are read by models that say something."""
SHOWN = 10
"""Candidates shown for each query."""
RISE = "the increase of an example's loss"
SHIFT = "the change in the model's prediction for an example"
BUDGET_CAPTION = (
    "MRR of each attributor after a given time, with the candidates that it has not scored yet ranked last. Each "
    "scores candidates at its own measured speed, in one random order; those that a screen kept come first."
)


class Ranked(Protocol):
    """What the page reads of an [`Attribution`]."""

    @property
    def queries(self) -> Dataset:
        """The queries, one row each."""
        ...

    @property
    def candidates(self) -> Dataset:
        """The candidates, one row each."""
        ...

    @property
    def method(self) -> str:
        """The attributor's name."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The options that the scores were computed with."""
        ...

    @property
    def scores(self) -> np.ndarray:
        """Scores, `[queries, candidates]`, or `[queries, top_k]` with `indices`."""
        ...

    @property
    def indices(self) -> np.ndarray | None:
        """The best candidates of each query, where only these were kept."""
        ...

    @property
    def total(self) -> int:
        """Number of candidates that were traced."""
        ...

    @property
    def details(self) -> Dataset | None:
        """Scores of single tokens or places, for some pairs."""
        ...

    def top(self, query: int, k: int = 10) -> Dataset:
        """Return the best candidates of one query, best first."""
        ...

    def background(self, query: int) -> Background | None:
        """Return what all scores of a query look like."""
        ...

    def verdict(self, query: int) -> str:
        """Say in a sentence whether anything stands out."""
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
    """Write a page with the best candidates of each query; everything it shows is escaped.

    Args:
        path (`Path`): The file to write.
        attribution (`Attribution`): The result to show.
        proponents (`list[list[int]]`, *optional*): For each query, the row numbers of its proponents, which are
            marked.
        metrics (`dict`, *optional*): Figures by attributor and name, shown as a table.
        note (`str`, defaults to `""`): A remark on these figures, shown below the table.
        plot (`str`, defaults to `""`): SVG text, such as [`plots.budget_plot`] returns, shown below the table. It is
            not escaped.
        plot_caption (`str`, *optional*): Caption of the plot. Defaults to one for [`plots.budget_plot`].
        title (`str`, *optional*): Title of the page. Defaults to a question about what the model said or drew.
        columns (`tuple[str, ...]`, *optional*): Columns of input and target texts. Defaults to those that
            [`rows.text_columns`] finds.
        k (`int`, defaults to 10): Candidates shown for each query.
    """
    drawn = "image" in attribution.queries.column_names
    drawn = drawn and text_columns(attribution.queries.column_names) in CAPTIONS
    details = {(row["query"], row["candidate"]): row for row in attribution.details or []}
    queries = []
    for i, query in enumerate(attribution.queries):
        own = None if proponents is None else set(proponents[i])
        found = attribution.top(i, k)
        top = float(np.max(found["score"], initial=0.0))
        rows = [_candidate(row, columns, details.get((i, row["candidate"])), top, own) for row in found]
        queries.append(_query(query, columns, own) | {"rows": rows})
    environment = Environment(
        loader=PackageLoader("hf_forward_inf", "report"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("page.html").render(
        title=title or f"Which training examples made the model {'draw' if drawn else 'say'} this?",
        measured=SHIFT if attribution.config.get("measure") == "shift" else RISE + ("" if drawn else " (in nats)"),
        method=attribution.method,
        candidates=attribution.total,
        config={name: value for name, value in attribution.config.items() if value is not None and name != "run"},
        metrics=metrics or {},
        figures=sorted({name for row in (metrics or {}).values() for name in row}, key=_figure_order),
        queries=queries,
        note=note,
        plot=Markup(plot),
        plot_caption=plot_caption or BUDGET_CAPTION,
    )
    Path(path).write_text(page, encoding="utf-8")


def _texts(row: Mapping[str, Any], columns: tuple[str, ...] | None) -> tuple[str, str]:
    """Return a row's input and target, of given columns or of those that it has."""
    return text_and_target(row, columns or text_columns(row) or LAYOUTS[0])


def _query(row: Mapping[str, Any], columns: tuple[str, ...] | None, own: set[int] | None) -> dict[str, Any]:
    """Return the template's values for a query."""
    text, target = _texts(row, columns)
    contrast = row.get("contrast") or ("chosen" not in row and row.get("rejected"))
    return {
        "parts": _parts(text, rather_than(target, contrast) if contrast else target),
        "pictures": pictures_of(row),
        "proponents": None if own is None else len(own),
    }


def _candidate(
    row: Mapping[str, Any],
    columns: tuple[str, ...] | None,
    detail: Mapping[str, Any] | None,
    top: float,
    own: set[int] | None,
) -> dict[str, Any]:
    """Return the template's values for a candidate."""
    text, target = _texts(row, columns)
    on_picture = "image" in row and text_columns(row) in CAPTIONS
    terms = [] if on_picture else _heated(detail)
    whole = bool(terms) and text in "".join(
        piece for piece, _, _ in terms
    )  # the coloured tokens already show the text
    return {
        "rank": row["rank"],
        "score": row["score"],
        "width": max(0.0, 100 * row["score"] / top) if top > 0 else 0.0,
        "parts": [] if whole else _parts(text, target),
        "pictures": pictures_of(row),
        "name": str(row.get("id") or "") if on_picture else "",
        "terms": terms,
        "heat": heatmap(detail) if on_picture else "",
        "proponent": own is not None and row["candidate"] in own,
    }


def _heated(detail: Mapping[str, Any] | None) -> list[tuple[str, float, float]]:
    """Return tokens, their scores, and the opacity of each: its share of the highest score."""
    if detail is None:
        return []
    highest = max(map(abs, detail["term_scores"]), default=0.0) or 1.0
    pairs = zip(detail["terms"], detail["term_scores"], strict=True)
    return [(text, score, round(max(0.0, score) / highest, 3)) for text, score in pairs if text]


def _parts(text: str, target: str) -> list[tuple[str, bool]]:
    """Split a text at its sentinels and fill the target in; return pieces and whether each is the target's."""
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
