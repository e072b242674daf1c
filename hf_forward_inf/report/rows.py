"""One training row on the page: what it says, where it comes from, and what is known of it."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import ClassLabel, Dataset, Features

from hf_forward_inf.report.album import Album, Heatmap, Picture, heatmap
from hf_forward_inf.report.marks import Heat, Span, cut, marked, words
from hf_forward_inf.report.texts import (
    FIELDS,
    IDS,
    SOURCES,
    Piece,
    Turn,
    answer,
    has_captions,
    pieces,
    plain,
    shortened,
    turns,
)
from hf_forward_inf.utils.images import undecoded
from hf_forward_inf.utils.rows import LAYOUTS

LONG = 700
"""Characters of a text that are shown; the rest is folded."""
OWN = ("rank", "score", "candidate", "level", "stage")
TEXTS = frozenset(name for layout in LAYOUTS for name in layout) | {
    "image", "images", "input_ids", "output_ids", "labels", "attention_mask", "label", "prediction", "probability",
    "contrast", *FIELDS,
}  # fmt: skip
"""Columns that are shown by other means, or not at all."""


@dataclass
class Bubble:
    """A message: who speaks, and what; of a long one, the rest apart."""

    role: str
    spans: list[Span]
    rest: list[Span]
    system: bool
    repeats: int = 1


@dataclass
class View:
    """What the template shows of a row."""

    text: str
    answer: str
    spans: list[Span]
    rest: list[Span]
    bubbles: list[Bubble]
    pictures: list[Picture]
    heat: Heatmap | None
    alt: str
    label: str
    prediction: str
    identity: str
    source: str
    others: list[tuple[str, str]]
    rank: int = 0
    score: float = 0.0
    level: str = ""
    candidate: int = 0
    computed: bool = True
    proponent: bool = False
    copies: list["View"] = field(default_factory=list)

    @property
    def words(self) -> set[str]:
        """Words that another text may share."""
        return words(self.text)


class Reader:
    """Reads rows for the page.

    Args:
        album (`Album`): Takes their pictures.
        columns (`tuple[str, ...]`, *optional*): Columns of input and target texts. Defaults, for queries and for
            candidates alike, to those of a known layout.
    """

    def __init__(self, album: Album, columns: tuple[str, ...] | None = None):
        self.album, self.columns = album, columns
        self.systems: list[tuple[str, Bubble]] = []

    def read(
        self,
        row: Mapping[str, Any],
        features: Features,
        detail: Mapping[str, Any] | None = None,
        shared: Collection[str] = (),
        highest: float | None = None,
    ) -> View:
        """Return what is shown of a row.

        Args:
            row (`dict`): The row.
            features (`datasets.Features`): The features of its dataset, which name classes.
            detail (`dict`, *optional*): Scores of its tokens or places.
            shared (`set[str]`, defaults to none): Words to mark.
            highest (`float`, *optional*): The highest of such scores among all rows of the query.
        """
        columns = self.columns if self.columns and set(self.columns) & set(row) else None
        on_picture = has_captions(row)
        heat = Heat(None if on_picture else detail, highest)
        said = None if columns else turns(row)
        whole = pieces(row, columns)
        if not said and on_picture:
            whole = [Piece(piece.text, False) for piece in whole]
        spans, rest = ([], []) if said else cut(marked(whole, heat, shared), LONG)
        bubbles = [self._bubble(turn, heat, shared) for turn in said or []]
        if heat.is_lost:  # its tokens are not found in the text: they are shown themselves
            rest = [*rest, *heat.spans()]
        text = plain(row, columns)
        label = named(row, features, "label")
        return View(
            text=text, answer=answer(row, columns), spans=spans, rest=rest, bubbles=bubbles,
            pictures=self.album.add(row), heat=heatmap(detail, highest) if on_picture else None,
            alt=shortened(text, 100) or label, label=label, prediction=_prediction(row, features),
            identity=_first(row, IDS)[1], source=_first(row, SOURCES)[1], others=_others(row),
        )  # fmt: skip

    def _bubble(self, turn: Turn, heat: Heat, shared: Collection[str]) -> Bubble:
        system = turn.role == "system"
        spans, rest = cut(marked([Piece(turn.text, turn.answer)], heat, () if system else shared), LONG)
        bubble = Bubble(turn.role, spans, rest, system)
        if system:
            self.systems.append((turn.text, bubble))
        return bubble

    def count_systems(self) -> None:
        """Note with each system prompt in how many conversations it is the same."""
        times = Counter(text for text, _ in self.systems)
        for text, bubble in self.systems:
            bubble.repeats = times[text]


def rows_of(rows: Dataset) -> list[dict[str, Any]]:
    """Return rows one by one, with pictures as they are stored: a corrupt one is left out later."""
    for name in {"image", "images"} & set(rows.column_names):
        rows = undecoded(rows, name)
    return [rows[i] for i in range(len(rows))]


def named(row: Mapping[str, Any], features: Mapping[str, Any], column: str) -> str:
    """Return a row's class by its name, or what else its column holds; an empty text for nothing."""
    value, kind = row.get(column), features.get(column)
    if value is None:
        return ""
    if isinstance(kind, ClassLabel) and isinstance(value, int) and 0 <= value < (kind.num_classes or 0):
        return str(kind.int2str(value))
    return shortened(str(value), 60)


def _prediction(row: Mapping[str, Any], features: Features) -> str:
    said = named(row, features, "prediction")
    sure = row.get("probability")
    return f"{said} ({sure:.0%})" if said and isinstance(sure, float) else said


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, str]:
    """Return the first of these columns that a row has, and its value."""
    name = next((name for name in names if isinstance(row.get(name), str | int) and row[name] != ""), "")
    return name, shortened(str(row[name]), 60) if name else ""


def _others(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return names and values of columns that are not shown otherwise."""
    hidden = {*OWN, *TEXTS, _first(row, IDS)[0], _first(row, SOURCES)[0]}
    shown = {
        name: value for name, value in row.items()
        if name not in hidden and isinstance(value, str | int | float | bool | list) and value not in ("", [])
    }  # fmt: skip
    return [(name, shortened(str(value), 200)) for name, value in shown.items()]
