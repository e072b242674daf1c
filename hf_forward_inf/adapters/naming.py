"""Columns of other names than an adapter's: which of them are meant, where that is unambiguous."""

from collections.abc import Iterable, Mapping
from typing import Any

from datasets import ClassLabel, Image, Value

OTHER_NAMES = {
    "image": ("img", "picture", "photo", "jpg", "jpeg", "png", "webp"),
    "label": ("labels", "class", "category", "target"),
    "caption": ("text", "captions", "prompt", "description", "txt"),
    "text": ("sentence", "content", "document", "review", "body"),
    "tokens": ("words",),
}
"""Other names of columns, by ours."""
PAIRS = (
    ("input", "target"), ("input", "output"), ("inputs", "targets"), ("input_text", "target_text"),
    ("source", "target"), ("src", "tgt"), ("document", "summary"), ("article", "summary"), ("article", "highlights"),
    ("text", "summary"), ("text", "target"), ("query", "response"), ("query", "answer"), ("question", "response"),
    ("prompt", "response"), ("prompt", "answer"), ("prompt", "output"), ("instruction", "answer"),
    ("user", "assistant"),
)  # fmt: skip
"""Other names of what a model reads and what it is to say."""
QUESTIONS = (
    "question", "instruction", "query", "input", "inputs", "source", "user", "prompt", "text", "document", "article",
)  # fmt: skip
"""Names of what a model is asked, in queries without answers."""
ANSWERS = {answer for _, answer in PAIRS} | {"answers", "completion"}
"""Names of answers: queries that have one of them are not without."""
MEANINGFUL = {*QUESTIONS, *ANSWERS, "context", "system", "history"}
"""Columns that leave it unclear which are meant, if they are there besides a pair."""
TEXTS = ("string", "large_string")


def meant(columns: Iterable[str], features: Mapping[str, Any]) -> dict[str, str]:
    """Return which columns of a dataset are meant by missing ones: new names by those that are there.

    A column is meant if it is the only one of its type (images, classes), or the only one of a usual name, or the
    only one of texts.

    Args:
        columns (`Iterable[str]`): The columns that are read.
        features (`dict`): The dataset's features, by column.
    """
    columns = list(columns)
    found = {}
    for column in columns:
        if column not in features:
            free = {name: one for name, one in features.items() if name not in columns and name not in found}
            other = _stands_for(column, free)
            if other is not None:
                found[other] = column
    return found


def _stands_for(column: str, features: Mapping[str, Any]) -> str | None:
    kinds = {"image": _is_image, "label": _is_class, "caption": _is_text, "text": _is_text}
    named = [name for name in OTHER_NAMES.get(column, ()) if name in features]
    if len(named) == 1:
        return named[0]
    fits = kinds.get(column, lambda feature: False)
    typed = [name for name, feature in features.items() if fits(feature)]
    return typed[0] if len(typed) == 1 and not named else None


def pair_of(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the columns of question and answer, by other usual names; `None` if there are none or others besides."""
    meaningful = MEANINGFUL & set(names)
    return next((pair for pair in PAIRS if set(pair) == meaningful), None)


def lone_question(names: Iterable[str]) -> str | None:
    """Return the column of what is asked where there are no answers; `None` if there is none or several."""
    meaningful = MEANINGFUL & set(names)
    return meaningful.pop() if len(meaningful) == 1 and meaningful <= set(QUESTIONS) else None


def _is_image(feature: Any) -> bool:
    return isinstance(feature, Image)


def _is_class(feature: Any) -> bool:
    return isinstance(feature, ClassLabel)


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in TEXTS
