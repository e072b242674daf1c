"""The page: an attribution's queries with their best candidates, as one HTML file that loads nothing."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datasets import Dataset
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hf_forward_inf.report.album import Album
from hf_forward_inf.report.preview import write_preview
from hf_forward_inf.report.queries import Query, read_query
from hf_forward_inf.report.rows import Reader
from hf_forward_inf.report.texts import has_captions, is_labelled
from hf_forward_inf.scores.levels import RULE, Background
from hf_forward_inf.utils.fingerprints import FINGERPRINT

SHOWN = 10
"""Candidates shown for each query."""
OPENED = 3
"""Queries that are not folded at first; one where there are more than [`FEW`]."""
FEW = 5
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

    @property
    def plan(self) -> Any:
        """What was computed; its text is for people."""
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
    compare: Sequence[Ranked] = (),
    proponents: Sequence[Sequence[int]] | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    note: str = "",
    remarks: Sequence[str] | None = None,
    plot: str = "",
    plot_caption: str | None = None,
    title: str | None = None,
    columns: tuple[str, ...] | None = None,
    about: Mapping[str, str] | None = None,
    preview: str | Path | None = None,
    k: int = SHOWN,
) -> None:
    """Write a page with the best candidates of each query: one file that loads nothing, in which no data is markup.

    Args:
        path (`Path`): The file to write.
        attribution (`Attribution`): The result to show.
        compare (`list[Attribution]`, *optional*): Other attributors' results for the same queries; the page has a
            switch between them.
        proponents (`list[list[int]]`, *optional*): For each query, the row numbers of its proponents, which are
            marked.
        metrics (`dict`, *optional*): Figures by attributor and name, shown as a table.
        note (`str`, defaults to `""`): A remark on these figures, shown below the table.
        remarks (`list[str]`, *optional*): A sentence on each query, such as what the model says once it is trained
            without the best rows.
        plot (`str`, defaults to `""`): SVG text, such as [`plots.budget_plot`] returns, shown below the table. It is
            not escaped.
        plot_caption (`str`, *optional*): Caption of the plot. Defaults to one for [`plots.budget_plot`].
        title (`str`, *optional*): Title of the page. Defaults to a question about what the model said or drew.
        columns (`tuple[str, ...]`, *optional*): Columns of input and target texts, of queries and candidates alike.
            Defaults to those that [`rows.text_columns`] finds, in each for itself.
        about (`dict[str, str]`, *optional*): What the foot says besides versions and date: model, data, command.
        preview (`Path`, *optional*): A PNG to write, too: the first query's card, 1200 x 630, which sites show that
            link to the page.
        k (`int`, defaults to 10): Candidates shown for each query.

    Raises:
        ValueError: If a result to compare with has another number of queries.
    """
    for other in compare:
        if len(other.queries) != len(attribution.queries):
            raise ValueError(
                f"{other.method} has {len(other.queries)} queries and {attribution.method} "
                f"{len(attribution.queries)}: compare results for the same queries."
            )
    names = attribution.queries.column_names
    queries, album = _read([attribution, *compare], columns, proponents, remarks, k)
    config = {name: value for name, value in attribution.config.items() if value is not None and name != FINGERPRINT}
    page = _template("page.html").render(
        title=title or question(names), measured=_measured(attribution), method=attribution.method,
        total=attribution.total, config=config, metrics=metrics or {}, note=note, plot=Markup(plot),
        figures=sorted({name for row in (metrics or {}).values() for name in row}, key=_figure_order),
        plot_caption=plot_caption or BUDGET_CAPTION, queries=queries, pictures=album.stored(),
        attributors=[attribution.method, *(other.method for other in compare)], rule=RULE,
        opened=OPENED if len(queries) <= FEW else 1, about={**(about or {}), **_made(attribution)},
        preview=None if preview is None else Path(preview).name, style=_asset("page.css"), script=_asset("page.js"),
        script_hash=_hash(_asset("page.js")),
    )  # fmt: skip
    Path(path).write_bytes(page.encode("utf-8", "replace"))  # half a character, as in cut texts, is a question mark
    if preview is not None:
        write_preview(preview, queries[0], question(names), attribution.total)


def as_card(attribution: Ranked, queries: int = OPENED, k: int = 5) -> str:
    """Return the cards of the first queries as HTML for a notebook, without scripts.

    Args:
        attribution (`Attribution`): The result to show.
        queries (`int`, defaults to 3): Queries shown.
        k (`int`, defaults to 5): Candidates shown for each query.
    """
    shown, album = _read([attribution], None, None, None, k, queries)
    more = len(attribution.queries) - len(shown)
    return _template("card.html").render(queries=shown, pictures=album.stored(), style=_asset("page.css"), more=more)


def _read(
    attributions: Sequence[Ranked],
    columns: tuple[str, ...] | None,
    proponents: Sequence[Sequence[int]] | None,
    remarks: Sequence[str] | None,
    k: int,
    count: int | None = None,
) -> tuple[list[Query], Album]:
    """Return the first queries as the template shows them, with their pictures."""
    shown = len(attributions[0].queries) if count is None else min(count, len(attributions[0].queries))
    album = Album(expected=shown * (k * len(attributions) + 1))
    reader = Reader(album, columns)
    details = {(row["query"], row["candidate"]): row for row in attributions[0].details or []}
    queries = [
        read_query(
            i, attributions, reader, details, None if proponents is None else proponents[i],
            "" if remarks is None else remarks[i], k,
        )
        for i in range(shown)
    ]  # fmt: skip
    reader.count_systems()
    return queries, album


def question(names: Sequence[str]) -> str:
    """Return what a page asks about queries with these columns."""
    if is_labelled(names):
        return "Which training examples made the model choose this label?"
    return f"Which training examples made the model {'draw' if has_captions(names) else 'say'} this?"


def _measured(attribution: Ranked) -> str:
    if attribution.config.get("measure") == "shift":
        return SHIFT
    names = attribution.queries.column_names
    drawn = has_captions(names) and not is_labelled(names)
    return RISE if drawn else f"{RISE} (in nats)"


def _made(attribution: Ranked) -> dict[str, str]:
    """Return what the foot says of every page: how candidates were traced, version and date."""
    plan = {} if attribution.plan is None else {"traced": str(attribution.plan)}
    return {**plan, "hf_forward_inf": version("hf-forward-inf"), "date": date.today().isoformat()}


@cache
def _template(name: str) -> Any:
    environment = Environment(
        loader=PackageLoader("hf_forward_inf", "report/templates"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(name)


@cache
def _asset(name: str) -> Markup:
    """Return a file of our own, which is not escaped."""
    return Markup((files("hf_forward_inf.report") / "templates" / name).read_text(encoding="utf-8"))


def _hash(script: str) -> str:
    """Return the hash by which a browser knows our script: it runs no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _figure_order(name: str) -> tuple[int, str, int]:
    kind, _, k = name.partition("@")
    order = ("top1", "top5", "mrr", "mrr_se", "precision", "recall")
    return (order.index(kind) if kind in order else len(order), kind, int(k.partition("_")[0] or 0))
