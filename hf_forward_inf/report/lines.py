"""Rows as a line of text, for terminals, lists and tables: pictures by their files, classes by their names."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Image

from hf_forward_inf.report.rows import named
from hf_forward_inf.report.texts import BLANK, answer, is_language, plain, question

IMAGE = "image"
"""Column of pictures."""


@dataclass(frozen=True)
class Line:
    """What a row says.

    Args:
        asked (`str`): Its text without what the model says, a blank in its place; of a picture, the name of its file.
        said (`str`): What the model says to it, if anything; a class by its name.
        row (`dict`): The row without its pictures.
    """

    asked: str
    said: str
    row: Mapping[str, Any]

    @property
    def text(self) -> str:
        """Both: what is said in its place, or after an arrow."""
        if BLANK in self.asked:
            return plain(self.row)
        return f"{self.asked} → {self.said.strip()}" if self.asked and self.said else self.asked or self.said


def lines(rows: Dataset, classes: ClassLabel | None = None) -> list[Line]:
    """Return each row as a line; no picture is decoded.

    Args:
        rows (`datasets.Dataset`): Queries or candidates.
        classes (`datasets.ClassLabel`, *optional*): Names the classes of rows that only have their numbers.
    """
    return [_line(row, rows, file, classes) for row, file in zip(_readable(rows), _files(rows), strict=True)]


def classes_of(rows: Dataset) -> ClassLabel | None:
    """Return the names of the rows' classes, if a column has them."""
    return next((one for one in rows.features.values() if isinstance(one, ClassLabel)), None)


def _line(row: dict[str, Any], rows: Dataset, file: str, classes: ClassLabel | None) -> Line:
    label = next((name for name in ("label", "labels") if name in row), None)
    if label is None or is_language(row):
        return Line(f"{file} {question(row)}".strip(), answer(row), row)
    kind = rows.features[label] if isinstance(rows.features[label], ClassLabel) else classes
    return Line(f"{file} {plain(row)}".strip(), named(row, {label: kind}, label), row)


def _readable(rows: Dataset) -> list[dict[str, Any]]:
    """Return rows without their pictures."""
    texts = [name for name, kind in rows.features.items() if "Image(" not in str(kind)]
    return rows.select_columns(texts).to_list() if texts else [{} for _ in range(len(rows))]


def _files(rows: Dataset) -> list[str]:
    """Return the names of the pictures' files, which a terminal shows in their place."""
    if not isinstance(rows.features.get(IMAGE), Image):
        return [""] * len(rows)
    stored = rows.select_columns([IMAGE]).cast_column(IMAGE, Image(decode=False))
    return [Path((row[IMAGE] or {}).get("path") or "").name for row in stored]
