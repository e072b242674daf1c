"""Columns of text datasets: which of them are read, and how rows of other habits become ours."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_forward_inf.adapters.base import Rows

OUTPUT_IDS = "output_ids"
"""Column of the tokens that the model generated: they are traced, and the answer's text is for people."""
SPAN = "span"
"""Column that names a part of the completion."""
TEMPLATE = ("tools", "chat_template_kwargs")
"""Columns that a chat template reads besides the messages."""
INPUT_IDS, LABELS = "input_ids", "labels"
MASKS = ("attention_mask", "completion_mask", "assistant_masks")
"""Columns that say which tokens of pre-tokenized rows are read and which count."""
PICTURES = ("images", "image")
"""Columns of pictures, several or one, besides those in messages."""
IGNORED = -100
"""The label that transformers' losses skip."""

CONVERSATIONS = "conversations"
PAIRS = (("instruction", "output"), ("instruction", "response"), ("question", "answer"))
"""Other names for what the user says and what the assistant answers."""
CHAT_PAIR = ("question", "answer")
"""The pair of them under which columns of other names are read."""
CONTEXTS = ("input", "context")
"""Columns that may follow an `instruction` in the user's turn."""
CHANGES_THE_PROMPT = (*CONTEXTS, "system", "history")
"""Columns without which the prompt of such a pair is another."""


class UnreadableRow(ValueError):
    """A row that can't be read; the message is the reason."""


@dataclass(frozen=True)
class TextColumns:
    """The columns of rows for a causal language model.

    Args:
        text (`str`, defaults to `"text"`): Texts.
        prompt (`str`, defaults to `"prompt"`): Prompts, as texts or lists of messages.
        completion (`str`, defaults to `"completion"`): Completions, as texts or lists of messages.
        messages (`str`, defaults to `"messages"`): Conversations.
        chat (`bool`, defaults to `True`): Whether the tokenizer has a chat template, which says how a question and its
            answer are joined.
    """

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    chat: bool = True

    def read(self, names: Iterable[str], answered: bool = True) -> tuple[str, ...]:
        """Choose the columns to read of rows that have columns of these names.

        Args:
            names (`Iterable[str]`): Names of columns.
            answered (`bool`, defaults to `True`): Whether prompts must have completions.

        Raises:
            ValueError: If the rows have no columns that are known, or it is unclear which are meant.
        """
        names = list(names)
        pair = (self.prompt, self.completion)
        formats: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
            ((INPUT_IDS,), (LABELS, *MASKS, *PICTURES, SPAN)),
            (pair, (*TEMPLATE, *PICTURES, OUTPUT_IDS, SPAN)),
            ((self.messages,), (*TEMPLATE, *PICTURES, OUTPUT_IDS, SPAN)),
            ((CONVERSATIONS,), (*TEMPLATE, *PICTURES, OUTPUT_IDS, SPAN)),
            ((self.text,), (*PICTURES, SPAN)),
        ]
        if not answered:
            formats.append(((self.prompt,), (*TEMPLATE, *PICTURES)))
        for required, optional in formats:
            if set(required) <= set(names):
                return (*required, *(name for name in optional if name in names))
        return self._of_another_habit(names)

    def _of_another_habit(self, names: list[str]) -> tuple[str, ...]:
        """Choose a question's and an answer's column by their usual names."""
        found = [pair for pair in PAIRS if set(pair) <= set(names)]
        wanted = f"`{self.messages}`; `{self.prompt}` and `{self.completion}`; `{self.text}`; or `{INPUT_IDS}`"
        advice = (
            f"Rows need columns {wanted}; these have {', '.join(names)}. Rename them, or name yours (on the command "
            "line --input_column, --target_column)"
        )
        if len(found) != 1:
            raise ValueError(f"{advice}.")
        (first, answer) = found[0]
        context = [name for name in CHANGES_THE_PROMPT if name in names]
        if len(context) > 1 or (context and not (first == "instruction" and context[0] in CONTEXTS)):
            raise ValueError(
                f"{advice}: how {', '.join(f'`{name}`' for name in context)} enter the prompt is unclear."
            )
        if not self.chat:
            raise ValueError(
                f"{advice}: the tokenizer has no chat template that says how `{first}` and `{answer}` are joined."
            )
        return (first, *context, answer, *(name for name in (*TEMPLATE, SPAN) if name in names))

    def how_read(self, columns: tuple[str, ...]) -> str | None:
        """Return a sentence on how columns of another habit are read, `None` for others."""
        first = columns[0]
        if first in (INPUT_IDS, self.messages, self.prompt, self.text):
            return None
        if first == CONVERSATIONS:
            how = f"`{CONVERSATIONS}` are read as messages"
        else:
            answer = next(name for name in columns if name in [last for _, last in PAIRS])
            asked = " with ".join(f"`{name}`" for name in columns[: columns.index(answer)])
            how = f"{asked} is read as the user's turn of a chat, `{answer}` as the assistant's"
        return f"Of the rows, {how}. If the model was trained on other texts, give those as `{self.text}`."

    def conversation(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a row of another habit in ours, with messages; `None` for a row that is in ours already."""
        if CONVERSATIONS in row and self.messages not in row:
            return {self.messages: row[CONVERSATIONS], **{k: v for k, v in row.items() if k != CONVERSATIONS}}
        pair = next((pair for pair in PAIRS if set(pair) <= set(row)), None)
        if pair is None or {self.messages, self.prompt, self.text, INPUT_IDS} & set(row):
            return None
        asked = [row[name] for name in (pair[0], *CONTEXTS) if row.get(name)]
        for value in (*asked, row[pair[1]]):
            if value is not None and not isinstance(value, str):
                raise UnreadableRow(f"it holds {type(value).__name__} where a text must be")
        turns = [{"role": "user", "content": "\n\n".join(asked)}, {"role": "assistant", "content": row[pair[1]] or ""}]
        rest = {name: row[name] for name in (*TEMPLATE, SPAN) if name in row}
        return {self.messages: turns, **rest}


def pretokenized(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return the tokens and labels of a row that was tokenized already; padding is dropped.

    Without labels every token counts that no mask leaves out.

    Raises:
        UnreadableRow: If columns differ in length, or something between tokens is masked.
    """
    ids = integers(row[INPUT_IDS], INPUT_IDS)
    masks = {name: integers(row[name], name) for name in MASKS if row.get(name) is not None}
    given = row.get(LABELS)
    labels = ids if given is None else integers(given, LABELS)
    for name, values in {LABELS: labels, **masks}.items():
        if len(values) != len(ids):
            raise UnreadableRow(f"`{name}` has {len(values)} values for {len(ids)} tokens")
    seen = masks.pop("attention_mask", [1] * len(ids))
    if given is None and masks:
        labels = [token if all(bits) else IGNORED for token, *bits in zip(ids, *masks.values(), strict=True)]
    places = [place for place, bit in enumerate(seen) if bit]
    if places and places[-1] - places[0] + 1 != len(places):
        raise UnreadableRow("`attention_mask` masks tokens between others: packed rows can't be read")
    return [ids[place] for place in places], [labels[place] for place in places]


def integers(values: Any, name: str) -> list[int]:
    """Return a list of whole numbers, or raise an [`UnreadableRow`]."""
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise UnreadableRow(f"`{name}` must hold a list of whole numbers")
    return values


def has_pictures(value: Any) -> bool:
    """Whether what a column of pictures holds is any."""
    return value is not None and not (isinstance(value, list) and not value)


def refuse_pictures(row: Mapping[str, Any]) -> None:
    """Raise an [`UnreadableRow`] if a row has pictures besides its texts."""
    if name := next((name for name in PICTURES if has_pictures(row.get(name))), None):
        raise UnreadableRow(f"it has pictures (`{name}`), which are read with a processor: give that instead")


def as_object(value: Any, column: str) -> Any:
    """Return what JSON text holds, and anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UnreadableRow(f"`{column}` holds a text that is not JSON ({error})") from error


def each_row(rows: Rows) -> list[dict[str, Any]]:
    """Return columns as rows."""
    return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]


def read_rows(rows: Rows, read: Callable[[dict[str, Any]], dict[str, Any]], blank: dict[str, Any]) -> Rows:
    """Read rows one by one; a row that can't be read has blank features and a reason in `unreadable`.

    Args:
        rows (`dict[str, list]`): Columns.
        read (`Callable`): Returns a row's features, or raises [`UnreadableRow`].
        blank (`dict`): Features of a row that can't be read.
    """
    features: list[dict[str, Any]] = []
    for row in each_row(rows):
        try:
            features.append({**read(row), "unreadable": ""})
        except UnreadableRow as reason:
            features.append({**blank, "unreadable": str(reason)})
    return {name: [one[name] for one in features] for name in (*blank, "unreadable")}


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in value)
    )


def asked_items(inputs: Any) -> list[Any]:
    """Return what a user asks as a list: all texts and conversations, or all rows of the same columns.

    Args:
        inputs: A text, a conversation, a row, or a list of one of these.

    Raises:
        TypeError: If it is something else, or of several kinds.
    """
    several = isinstance(inputs, list | tuple) and not is_conversation(inputs)
    items = list(inputs) if several else [inputs]
    for item in items:
        if not (isinstance(item, str | Mapping) or is_conversation(item)):
            raise TypeError(
                "A query is a text or a row (dict) or a conversation (a list of messages with `role` and `content`), "
                f"not {type(item).__name__}."
            )
    if len({tuple(sorted(item)) if isinstance(item, Mapping) else () for item in items}) > 1:
        raise TypeError(
            "The queries of one call must be of one kind: texts, conversations, or rows of the same columns."
        )
    return items
