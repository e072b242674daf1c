"""Conversations as tokens: rendered by the tokenizer's chat template, with the assistant's tokens marked."""

import re
from collections.abc import Mapping, Sequence, Set
from itertools import groupby
from typing import Any, Literal, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_forward_inf.adapters.columns import TEMPLATE, UnreadableRow, as_object

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
"""Speakers of messages that are written with `from` and `value`."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What marks the assistant's words in a chat template."""
Message: TypeAlias = dict[str, Any]
Turns: TypeAlias = Literal["all", "last"]
"""Which of the assistant's turns count."""


def as_messages(value: Any, column: str) -> list[Message]:
    """Return a conversation as a list of messages with `role` and `content`, nulls left out.

    Args:
        value: A list of messages, with `role` and `content` or with `from` and `value`, or such a list as JSON.
        column (`str`): Where it stands, for messages.

    Raises:
        UnreadableRow: If it is something else, or empty.
    """
    messages = as_object(value, column)
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise UnreadableRow(f"`{column}` must hold a list of messages, not {_shown(messages)}")
    if not messages:
        raise UnreadableRow(f"`{column}` holds no message")
    return [_message(without_nulls(message), column) for message in messages]


def _shown(value: Any) -> str:
    return f"a list of {type(value[0]).__name__}" if isinstance(value, list) and value else type(value).__name__


def _message(message: Message, column: str) -> Message:
    if "role" in message:
        return message
    if set(message) != {"from", "value"} or message["from"] not in ROLES:
        raise UnreadableRow(
            f"`{column}` holds a message with {', '.join(f'{k}={v!r}' for k, v in message.items())}: it needs `role` "
            "and `content`"
        )
    return {"role": ROLES[message["from"]], "content": message["value"]}


def without_nulls(value: Any) -> Any:
    """Leave out every key whose value is `None`, at any depth: Arrow adds keys that only other rows have."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def _check_parts(messages: list[Message], kinds: Set[str]) -> None:
    """Refuse contents with parts of other kinds than can be read."""
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    parts = [part for content in contents for part in content]
    other = {part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in parts} - kinds
    if other:
        raise UnreadableRow(
            f"its messages hold parts that the adapter can't read ({', '.join(sorted(map(str, other)))}): pictures "
            "are read with a processor, ForwardInf(model, processor)"
        )


class ChatTemplate:
    """A tokenizer's chat template, with what one row gives it.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`): With a chat template.
        row (`dict`): A row; its columns `tools` and `chat_template_kwargs` are read.
        sees (`bool`, defaults to `False`): Whether messages may hold pictures.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], sees: bool = False):
        self.kinds = {"text", "image"} if sees else {"text"}
        tools, options = (without_nulls(as_object(row.get(name), name)) for name in TEMPLATE)
        self.tokenizer = tokenizer
        self.options = {"tools": tools, **(options or {})}

    def render(self, messages: list[Message], asks: bool = False) -> str:
        """Return a conversation as text.

        Args:
            messages (`list[dict]`): The conversation; the text of none is empty.
            asks (`bool`, defaults to `False`): Whether the assistant's turn comes next.

        Raises:
            UnreadableRow: If the template refuses it.
        """
        _check_parts(messages, self.kinds)
        return str(self._apply(messages, tokenize=False, add_generation_prompt=asks)) if messages else ""

    def tokenize(self, messages: list[Message], asks: bool = False) -> list[int]:
        """Return a conversation as tokens, as [`render`] writes it."""
        return self._tokens(self.render(messages, asks))["input_ids"]

    def completion(self, before: list[Message], after: list[Message]) -> tuple[list[int], list[bool]]:
        """Return a conversation's tokens, and of each whether it belongs to the messages at the end."""
        ids = self.tokenize([*before, *after])
        start = common(self.tokenize(before, asks=True), ids)
        return ids, [place >= start for place in range(len(ids))]

    def assistant(self, messages: list[Message], turns: Turns = "all") -> tuple[list[int], list[bool]]:
        """Return a conversation's tokens, and of each whether the assistant says it.

        By the template's generation marks; without any, by rendering the conversation turn by turn.

        Args:
            messages (`list[dict]`): The conversation.
            turns (`str`, defaults to `"all"`): Mark `"all"` turns of the assistant, or the `"last"` one.

        Raises:
            UnreadableRow: If the assistant says nothing, or it is unclear where.
        """
        _check_parts(messages, self.kinds)
        if self._is_marked():
            made = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            ids, said = made["input_ids"], [bool(bit) for bit in made["assistant_masks"]]
            said = said if turns == "all" else last_run(said)
        else:
            ids, said = self._turn_by_turn(messages, turns)
        if not any(said):
            raise UnreadableRow("the assistant says nothing in it")
        return ids, said

    def _is_marked(self) -> bool:
        template = self.options.get("chat_template") or self.tokenizer.get_chat_template(
            tools=self.options.get("tools")
        )
        return self.tokenizer.is_fast and GENERATION.search(template) is not None

    def _turn_by_turn(self, messages: list[Message], turns: Turns) -> tuple[list[int], list[bool]]:
        text = self.render(messages)
        encoded = self._tokens(text)
        said = [False] * len(encoded["input_ids"])
        speaking = [turn for turn, message in enumerate(messages) if message.get("role") == "assistant"]
        for turn in speaking if turns == "all" else speaking[-1:]:
            first, last = self._tokens_between(*self._span(messages, turn, text), text, encoded)
            said[first:last] = [True] * (last - first)
        return encoded["input_ids"], said

    def _span(self, messages: list[Message], turn: int, text: str) -> tuple[int, int]:
        """Find where an assistant's turn begins and ends in the text of the whole conversation."""
        bare = self.render(messages[:turn])
        asked = self.render(messages[:turn], asks=True) if turn else text[: self._behind_header(text)]
        finished = self.render(messages[: turn + 1]) if turn + 1 < len(messages) else text
        start = common(asked, text)
        if start < common(bare, asked) or finished[:start] != text[:start]:
            raise UnreadableRow(
                "the chat template writes earlier turns in another way once later ones follow, so it is unclear which "
                "tokens are the assistant's: mark them in the template with {% generation %}, or count the last turn "
                "alone (CausalLMAdapter(..., turns='last'))"
            )
        left_out, length = overlap(finished[start:], text[start:])
        end = start + left_out + length
        return self._last_boundary(asked, start), start + length - (end - self._last_boundary(finished, end))

    def _last_boundary(self, text: str, place: int) -> int:
        """Move a place at which another text goes on differently back to the end of a token."""
        if place == len(text) or not self.tokenizer.is_fast:
            return place
        return max((stop for _, stop in self._tokens(text)["offset_mapping"] if stop <= place), default=place)

    def _behind_header(self, text: str) -> int:
        """Find where a turn begins in which the assistant speaks first: behind what asks for it after a question."""
        user = [{"role": "user", "content": "?"}]
        bare, asked = self.render(user), self.render(user, asks=True)
        header = asked[common(bare, asked) :]
        # Of a header that opens a thought, finished turns have the first part.
        found = next((n for n in range(len(header), len(header) // 2, -1) if header[:n] in text), 0)
        return text.find(header[:found]) + found

    def _tokens(self, text: str) -> Any:
        # The template writes the special tokens itself. verbose=False: our own warning counts the long rows, once.
        return self.tokenizer(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=self.tokenizer.is_fast
        )

    def _tokens_between(self, start: int, stop: int, text: str, encoded: Any) -> tuple[int, int]:
        """Find the tokens that reach into a part of a text: the first, and the one behind the last."""
        if self.tokenizer.is_fast:
            places = encoded["offset_mapping"]
            return sum(end <= start for _, end in places), sum(begin < stop for begin, _ in places)
        first, last = (common(self._tokens(text[:end])["input_ids"], encoded["input_ids"]) for end in (start, stop))
        return first, last

    def _apply(self, messages: list[Message], **options: Any) -> Any:
        if any(isinstance(message.get("content"), list) for message in messages) and not self._takes_parts():
            messages = [_joined(message) for message in messages]
        return self._call(messages, **options)

    def _takes_parts(self) -> bool:
        """Whether the template reads contents that are lists of parts, and does not just print the list."""
        parts = [{"type": "text", "text": "?"}]
        try:
            return str(parts)[1:-1] not in self._call([{"role": "user", "content": parts}], tokenize=False)
        except UnreadableRow:
            return False

    def _call(self, messages: list[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, **{**self.options, **options})
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise UnreadableRow(f"the chat template refuses it ({error})") from error


def _joined(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(str(part.get("text", "")) for part in content)}


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Count what two sequences begin with together."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def overlap(turn: str, text: str) -> tuple[int, int]:
    """Find a turn at the beginning of a text, with or without the turn's own beginning and end.

    Templates leave out the thoughts with which an earlier turn began, or close only the last turn of all.

    Returns:
        `tuple`: How many characters of the turn's beginning are missing, and how many then agree.
    """
    whole = common(turn, text)
    if whole == len(turn):
        return 0, whole
    places = [i for i in range(1, len(turn)) if turn.startswith(text[: whole + 1], i)]
    return max([(0, whole), *((i, common(turn[i:], text)) for i in places)], key=lambda found: found[1])


def last_run(said: list[bool]) -> list[bool]:
    """Return marks of which only the last run of neighbours is left."""
    runs = [(mark, len(list(group))) for mark, group in groupby(said)]
    last = max((i for i, (mark, _) in enumerate(runs) if mark), default=-1)
    return [mark and i == last for i, (mark, length) in enumerate(runs) for _ in range(length)]
