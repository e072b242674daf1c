"""One query on the page: what the model said, whether anything stands out, and the best rows of each attributor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_forward_inf.report.duplicates import stacked
from hf_forward_inf.report.marks import Heat, Span, marked
from hf_forward_inf.report.rows import Bubble, Reader, View, rows_of
from hf_forward_inf.report.strip import strip
from hf_forward_inf.report.texts import Piece, shortened

MARKED = ("strong", "some")
"""Levels of rows that stand out."""
NAMED = 60
"""Longest answer that is quoted in a sentence."""
SENTENCE = 120
"""Longest text of a query that its head shows as a whole."""


@dataclass
class Ranking:
    """The best rows of one attributor for a query."""

    method: str
    verdict: str
    rows: list[View]
    strip: dict[str, Any] | None


@dataclass
class Query:
    """A query with the rankings of all attributors, the page's own first.

    Its head is its whole text in spans where that is short (`heading`), else its answer (`title`).
    """

    number: int
    view: View
    title: str
    heading: list[Span]
    rankings: list[Ranking]
    proponents: int | None
    remark: str

    @property
    def level(self) -> str:
        """The highest level among its best rows."""
        return next((row.level for row in self.rankings[0].rows), "") if self.rankings else ""


def read_query(
    number: int,
    attributions: Sequence[Any],
    reader: Reader,
    details: Mapping[tuple[int, int], Mapping[str, Any]],
    proponents: Sequence[int] | None,
    remark: str,
    k: int,
) -> Query:
    """Return what the template shows of a query.

    Args:
        number (`int`): Row number of the query.
        attributions (`list[Attribution]`): The page's own, and those that it is compared with.
        reader (`Reader`): Reads rows.
        details (`dict`): Scores of tokens, by query and candidate, of the page's own attribution.
        proponents (`list[int]`, *optional*): Row numbers of known proponents.
        remark (`str`): A sentence on the query.
        k (`int`): Rows shown.
    """
    queries = attributions[0].queries
    view = reader.read(rows_of(queries.select([number]))[0], queries.features)
    known = None if proponents is None else set(proponents)
    rankings = [
        _ranking(found, number, view, reader, details if found is attributions[0] else {}, known or set(), k)
        for found in attributions
    ]
    title = shortened(view.answer or view.text or view.label or f"Query {number + 1}", 140)
    _underline(view, rankings[0].rows)
    heading = _heading(view, whole=not title.endswith("…"))
    return Query(number, view, title, heading, rankings, None if known is None else len(known), remark)


def _underline(view: View, rows: list[View]) -> None:
    """Mark the words of a query that rows which stand out have, too."""
    shared = view.words & {word for row in rows if row.level in MARKED for word in row.words}
    parts: list[View | Bubble] = [view, *(bubble for bubble in view.bubbles if not bubble.system)]
    for part in parts:
        part.spans, part.rest = (
            marked([Piece(span.text, span.answer) for span in spans], Heat(None), shared)
            for spans in (part.spans, part.rest)
        )


def _heading(view: View, whole: bool) -> list[Span]:
    """Return the head of a query, a short text or a conversation's answer, and leave that out of its text."""
    if view.bubbles:
        shows = whole and view.bubbles[-1].role == "assistant"
        return view.bubbles.pop().spans if shows else []
    if view.rest or len(view.text) > SENTENCE:
        return []
    heading, view.spans = view.spans, []
    return heading


def _ranking(
    found: Any,
    number: int,
    query: View,
    reader: Reader,
    details: Mapping[tuple[int, int], Mapping[str, Any]],
    proponents: set[int],
    k: int,
) -> Ranking:
    best = found.top(number, k)
    hottest = (Heat(detail).highest for (i, _), detail in details.items() if i == number)
    highest = max(hottest, default=None)
    views = []
    for row in rows_of(best):
        view = reader.read(row, best.features, details.get((number, row["candidate"])), query.words, highest)
        view.rank, view.score, view.candidate = row["rank"], row["score"], row["candidate"]
        view.level, view.computed = row.get("level") or "", row.get("stage", True)
        view.proponent = view.candidate in proponents
        if view.identity == str(view.candidate):
            view.identity = ""
        views.append(view)
    dots = [(view.score, view.level) for view in views]
    verdict = f"{found.verdict(number)}{_also(query, views)}"
    return Ranking(found.method, verdict, _stacked(views), strip(found.background(number), dots))


def _stacked(views: list[View]) -> list[View]:
    """Return rows with those that say nearly the same below the first of them."""
    groups = stacked(["" if view.pictures else view.text for view in views])
    for first, *copies in groups:
        views[first].copies = [views[i] for i in copies]
    return [views[group[0]] for group in groups]


def _also(query: View, views: list[View]) -> str:
    """Say how many of the rows that stand out say the answer, and where all come from."""
    standing = [view for view in views if view.level in MARKED]
    parts = []
    if standing and query.answer and len(query.answer) <= NAMED:
        saying = sum(query.answer.casefold() in view.text.casefold() for view in standing)
        parts += [f"{saying} of them {'says' if saying == 1 else 'say'} “{query.answer}”"] if saying else []
    sources = {view.source for view in standing}
    if len(standing) > 1 and len(sources) == 1 and sources != {""}:
        parts.append(f"all come from {sources.pop()}")
    return f" {'; '.join(parts)[:1].upper()}{'; '.join(parts)[1:]}." if parts else ""
