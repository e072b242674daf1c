"""Rows as people read them: the answer in its place, conversations as turns, template tokens left out."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from hf_forward_inf.utils.rows import (
    SENTINEL,
    content_text,
    rather_than,
    text_and_target,
    text_columns,
    without_sentinels,
)

CAPTIONS = (None, ("caption",), ("text",))
"""Columns of texts next to pictures that a model draws or classifies; others are read by models that say something."""
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "ipython": "tool"}
"""Other names of roles."""
HEADER = re.compile(
    r"<\|im_start\|>(?P<chatml>\w+)\s*\n|<\|start_header_id\|>(?P<llama>\w+)<\|end_header_id\|>\s*"
    r"|<start_of_turn>(?P<gemma>\w+)\s*\n|<\|(?P<plain>system|user|assistant|tool)\|>\s*"
)
"""What begins a turn in the common chat templates."""
TEMPLATE = re.compile(
    r"<\|[a-zA-Z_]+\|>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|\[/?INST\]|\[(?:CLS|SEP|PAD|BOS|EOS)\]"
)
"""Tokens of templates."""
BLANK = "____"
"""What is shown in the place of what the model says."""
FIELDS = (
    "sentence", "sentence1", "sentence2", "premise", "hypothesis", "question", "question1", "question2", "passage",
    "text", "text_pair", "text1", "text2", "document", "content", "title", "prompt", "input", "output",
)  # fmt: skip
"""Names of columns of texts beyond the known layouts."""
IDS = ("id", "uid", "uuid", "key")
"""Columns that name a row."""
SOURCES = ("source", "dataset", "origin", "subset", "domain", "author", "artist", "url", "file", "file_name", "path")
"""Columns that say where a row comes from."""
NO_TEXTS = frozenset({*IDS, *SOURCES, "level", "label", "prediction"})


class Piece(NamedTuple):
    """A part of a text, and whether it is what the model learns to say."""

    text: str
    answer: bool


class Turn(NamedTuple):
    """A message of a conversation, and whether it is what the model learns to say."""

    role: str
    text: str
    answer: bool


def is_labelled(names: Iterable[str]) -> bool:
    """Whether columns of these names are a classifier's: a row has a label."""
    names = set(names)
    return bool(names & {"label", "labels"}) and "input_ids" not in names


def has_captions(names: Iterable[str]) -> bool:
    """Whether columns of these names hold pictures, alone or with captions: what a model draws or classifies."""
    names = set(names)
    return "image" in names and text_columns(names) in CAPTIONS


def is_language(names: Iterable[str]) -> bool:
    """Whether columns of these names are a language model's: they hold texts, and no pictures or classes to learn."""
    names = set(names)
    return "input_ids" in names or not (is_labelled(names) or has_captions(names))


def pieces(row: Mapping[str, Any], columns: tuple[str, ...] | None = None) -> list[Piece]:
    """Return a row's text in pieces, with its target filled in or appended.

    Args:
        row (`dict`): A row.
        columns (`tuple[str, ...]`, *optional*): Columns of its input and target. Defaults to those of a known layout.
    """
    known = columns or text_columns(row)
    if known is None:
        return [Piece(text, False)] if (text := "\n".join(_texts(row))) else []
    text, target = text_and_target(row, known)
    contrast = row.get("contrast") or ("chosen" not in row and row.get("rejected"))
    return _filled(text, rather_than(target, contrast) if contrast else target)


def _texts(row: Mapping[str, Any]) -> list[str]:
    """Return the texts of a row of no known layout, such as a pair of sentences."""
    found = {name: value for name, value in row.items() if isinstance(value, str) and value.strip()}
    named = [found[name] for name in FIELDS if name in found]
    return named or [value for name, value in found.items() if name not in NO_TEXTS]


def _filled(text: str, target: str) -> list[Piece]:
    """Split a text at its sentinels and fill the target in."""
    if not SENTINEL.search(text):
        apart = f"{text} " if text and target and not text[-1].isspace() else text
        return [piece for piece in (Piece(apart, False), Piece(without_sentinels(target), True)) if piece.text]
    answers = [without_sentinels(span) for span in SENTINEL.split(target)[1:]]
    found: list[Piece] = []
    for i, piece in enumerate(SENTINEL.split(text)):
        if i:
            found.append(Piece(answers[i - 1] if i <= len(answers) else "…", True))
        found.append(Piece(piece, False))
    return [piece for piece in found if piece.text]


def turns(row: Mapping[str, Any]) -> list[Turn] | None:
    """Return a row's conversation; `None` if it holds none."""
    found = _messages(row.get("messages") or row.get("conversations"))
    if not found:
        found = _messages(row.get("prompt"))
        if not found and _messages(row.get("completion")) is None and _messages(row.get("chosen")) is None:
            return _templated(row.get("text"))
    for name in ("completion", "chosen"):
        if row.get(name) and (not found or found[-1].role != "assistant"):
            found = [*(found or []), *_replies(row[name])]
            break
    contrast = row.get("contrast") or ("chosen" in row and row.get("rejected"))
    if contrast and found and found[-1].role == "assistant":
        found[-1] = found[-1]._replace(text=rather_than(found[-1].text, contrast))
    return found


def _messages(value: Any) -> list[Turn] | None:
    """Return a list of messages, or one as JSON, as turns; `None` for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
        return None
    return [_turn(str(one.get("role") or one.get("from") or "?"), _said(one)) for one in value]


def _said(message: Mapping[str, Any]) -> str:
    """Return a message's text, with the kinds of its other parts and its tool calls in brackets."""
    content = content_text(message.get("content") or message.get("value") or "")
    calls = message.get("tool_calls")
    return f"{content} [tool calls: {json.dumps(calls, default=str)}]".strip() if calls else content


def _turn(role: str, text: str) -> Turn:
    role = ROLES.get(role, role)
    return Turn(role, text.strip(), role == "assistant")


def _replies(value: Any) -> list[Turn]:
    return _messages(value) or [_turn("assistant", str(value))]


def _templated(text: Any) -> list[Turn] | None:
    """Return a text that a chat template wrote as turns; `None` for other texts."""
    heads = list(HEADER.finditer(text)) if isinstance(text, str) else []
    if not heads:
        return None
    ends = [*(head.start() for head in heads[1:]), len(text)]
    found = [
        _turn(str(head.group(str(head.lastgroup))), TEMPLATE.sub("", text[head.end() : end]))
        for head, end in zip(heads, ends, strict=True)
    ]
    return [turn for turn in found if turn.text]


def plain(row: Mapping[str, Any], columns: tuple[str, ...] | None = None) -> str:
    """Return a row's whole text, as it is read: without system prompts, template tokens and sentinels."""
    said = None if columns else turns(row)
    if said:
        return "\n".join(turn.text for turn in said if turn.role != "system")
    return TEMPLATE.sub("", "".join(piece.text for piece in pieces(row, columns))).strip()


def question(row: Mapping[str, Any], columns: tuple[str, ...] | None = None) -> str:
    """Return a row's text without what the model says, or with a blank in its place; all of a row that is one text."""
    said = None if columns else turns(row)
    if said:
        last = max((i for i, turn in enumerate(said) if turn.answer), default=len(said))
        return "\n".join(turn.text for i, turn in enumerate(said) if turn.role != "system" and i != last)
    known = columns or text_columns(row)
    text = text_and_target(row, known)[0] if known else plain(row)
    return TEMPLATE.sub("", SENTINEL.sub(BLANK, text)).strip()


def answer(row: Mapping[str, Any], columns: tuple[str, ...] | None = None) -> str:
    """Return what the model says in a row; an empty text if the row is one text."""
    said = None if columns else turns(row)
    if said:
        return next((turn.text for turn in reversed(said) if turn.answer), "")
    return " ".join(piece.text.strip() for piece in pieces(row, columns) if piece.answer)


def shortened(text: str, length: int) -> str:
    """Return a text on one line, cut at a word and marked where it is longer."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length].rsplit(' ', 1)[0][: length - 1]}…"
