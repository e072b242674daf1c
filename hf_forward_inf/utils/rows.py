"""Rows of text: find their columns, read input and target, fill in sentinels, draw a sample."""

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from datasets import Dataset, Value

LAYOUTS = (
    ("inputs_pretokenized", "targets_pretokenized"),
    ("messages",),
    ("prompt", "completion"),
    ("text",),
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("caption",),
    ("conversations",),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
"""Known columns of inputs and targets: FTRACE's, those of TRL's trainers, captions, and other habits."""
SENTINEL = re.compile(r"<extra_id_\d+>")


def fill_in(inputs: str, target: str) -> str:
    """Return the input with each sentinel replaced by the target's span; a target without sentinels is appended.

    Example:
        >>> fill_in("The capital of France is <extra_id_0>.", "<extra_id_0> Paris")
        'The capital of France is Paris.'
    """
    spans = dict(zip(SENTINEL.findall(target), (s.strip() for s in SENTINEL.split(target)[1:]), strict=True))
    if not spans:
        return f"{inputs} {target}".strip()
    return SENTINEL.sub(lambda match: spans.get(match.group(), match.group()), inputs)


def without_sentinels(target: str) -> str:
    """Return a target without sentinels: "New York" for "<extra_id_0> New York"."""
    return " ".join(SENTINEL.sub(" ", target).split())


def text_columns(names: Iterable[str]) -> tuple[str, ...] | None:
    """Return the columns of input and target texts, or the one of both; `None` if no known layout fits."""
    names = set(names)
    return next((layout for layout in LAYOUTS if set(layout) <= names), None)


def holds_texts(rows: Dataset, column: str) -> bool:
    """Whether a column holds texts, or conversations (lists of messages)."""
    feature = rows.features[column]
    if isinstance(feature, Value):
        return feature.dtype in ("string", "large_string")
    messages = getattr(feature, "feature", None)
    return isinstance(messages, dict) and not {"content", "value"}.isdisjoint(messages)


def text_and_target(row: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[str, str]:
    """Return a row's input and target: the last of several columns, the last message of a conversation, both answers.

    Example:
        >>> text_and_target({"prompt": "Capital of Peru?", "completion": " Lima"}, ("prompt", "completion"))
        ('Capital of Peru?', ' Lima')
    """
    values = [row.get(column) for column in columns]
    if columns[-1] == "rejected":
        return "\n".join(map(_plain, values[:-2])), rather_than(values[-2], values[-1])
    if len(values) > 1:
        return "\n".join(map(_plain, values[:-1])), _plain(values[-1])
    if isinstance(values[0], list):
        return _plain(values[0][:-1]), _plain(values[0][-1:])
    return _plain(values[0]), ""


def rather_than(said: Any, other: Any) -> str:
    """Return an answer and the one that it is compared with, texts or messages, as a text."""
    return f"{_plain(said).strip()} rather than {without_sentinels(_plain(other))}"


def _plain(value: Any) -> str:
    if not isinstance(value, list):
        return str(value or "")
    contents = (message.get("content") or message.get("value") or "" for message in value)
    return "\n".join(map(content_text, contents))


def content_text(content: Any) -> str:
    """Return a message's content as text; of a list of parts each one's text, or its kind in brackets."""
    if not isinstance(content, list):
        return str(content)
    return " ".join(
        str(part.get("text") or f"[{part.get('type')}]") if isinstance(part, Mapping) else str(part)
        for part in content
    )


def as_stored(rows: Dataset, role: str) -> Dataset:
    """Return rows as they are stored, whatever format was set: tensors and arrays hold the same values.

    A transform (`set_transform`) may change what rows say, or draw at random, and is not applied: a warning says so.
    """
    if rows.format["type"] == "custom":
        warnings.warn(
            f"The {role} have a transform (set_transform), which is not applied: rows are read as they are stored. If "
            "scores are to depend on it, apply it with map.",
            stacklevel=4,
        )
    formatted = rows.format["type"] is not None or rows.format["columns"] != rows.column_names
    return rows.with_format(None) if formatted else rows


def sample_rows(rows: Dataset, count: int, seed: int = 0) -> Dataset:
    """Return `count` random rows in their order, or all rows if there are no more."""
    if len(rows) <= count:
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:count]))
