"""Rows of a causal language model: their tokens, those that count, and where an answer belongs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, pairwise
from typing import Any

from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase

from hf_forward_inf.adapters.base import Rows
from hf_forward_inf.adapters.chat import ChatTemplate, Message, Turns, as_messages, common
from hf_forward_inf.adapters.columns import (
    IGNORED,
    INPUT_IDS,
    OUTPUT_IDS,
    SPAN,
    TextColumns,
    UnreadableRow,
    each_row,
    pretokenized,
    refuse_pictures,
)
from hf_forward_inf.adapters.generation import answer_text
from hf_forward_inf.adapters.tokens import Tokens

ANSWERERS = ("user", "tool")
"""Whose turns the assistant answers."""


class TextRows:
    """Turns rows into tokens as TRL's supervised trainer does.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`): The model's tokenizer.
        names (`tuple[str, ...]`): Columns of texts, prompts, completions and messages.
        turns (`str`, defaults to `"all"`): Which of the assistant's turns count.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: tuple[str, str, str, str], turns: Turns = "all"):
        self.tokenizer, self.tokens = tokenizer, Tokens(tokenizer)
        self.names = names
        self.text, self.prompt, self.completion, self.messages = names
        self.turns: Turns = turns
        self.sees = False  # whether pictures have their places in texts and messages
        # What closes a text, where the tokenizer doesn't do it by itself.
        closes = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
        self.end = "" if closes else tokenizer.eos_token or ""

    @property
    def columns(self) -> TextColumns:
        """The columns that rows may have."""
        return TextColumns(*self.names, chat=self.tokenizer.chat_template is not None)

    def columns_in(self, names: Iterable[str], answered: bool = True) -> tuple[str, ...]:
        """Return the columns to read of rows that have columns of these names ([`TextColumns.read`])."""
        return self.columns.read(names, answered)

    def knows(self, names: Iterable[str], answered: bool) -> bool:
        """Whether rows with columns of these names can be read; as [`columns_in`]."""
        try:
            return bool(self.columns_in(names, answered))
        except ValueError:
            return False

    def how_read(self, columns: tuple[str, ...]) -> str | None:
        """Return a sentence on how columns of another habit are read, `None` for others."""
        return self.columns.how_read(columns)

    def tokens_and_labels(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Return a row's tokens, and its labels: the tokens that count, else -100.

        Raises:
            UnreadableRow: If it can't be read.
        """
        row = self.columns.conversation(row) or row
        refuse_pictures(row)
        if INPUT_IDS in row:
            return pretokenized(row)
        if row.get(OUTPUT_IDS) is not None:
            return self._generated(row)
        if self.messages in row:
            ids, said = self._chat(row).assistant(as_messages(row[self.messages], self.messages), self.turns)
        elif isinstance(row.get(self.prompt), list):
            ids, said = self._chat(row).completion(*self._both_sides(row))
        else:
            return self._text_row(row)
        return ids, [token if bit else IGNORED for token, bit in zip(ids, said, strict=True)]

    def _chat(self, row: Mapping[str, Any]) -> ChatTemplate:
        if self.tokenizer.chat_template is None:
            raise UnreadableRow(
                "it is a conversation, and the tokenizer has no chat template: set tokenizer.chat_template to the one "
                "that the model was trained with"
            )
        return ChatTemplate(self.tokenizer, row, self.sees)

    def _both_sides(self, row: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
        """Return the messages of a prompt and of its completion."""
        after = row[self.completion]
        if not after:
            raise UnreadableRow(f"`{self.completion}` is empty")
        if isinstance(after, str):
            after = [{"role": "assistant", "content": after}]
        return as_messages(row[self.prompt], self.prompt), as_messages(after, self.completion)

    def tokenized(self, rows: Sequence[Mapping[str, Any]]) -> AbstractContextManager[None]:
        """Tokenize what rows of plain texts hold at once, for the length of a `with` in which they are read."""
        return self.tokens.together(self._texts(rows))

    def _texts(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """Yield the texts of rows, each whole, and their prompts; nothing of conversations and generated answers."""
        names = set(rows[0]) if rows else set()
        if names & {INPUT_IDS, OUTPUT_IDS, self.messages} or not names & {self.text, self.completion}:
            return
        for row in rows:
            prompt, text = (row.get(name) or "" for name in (self.prompt, self._last(row)))
            if isinstance(prompt, str) and isinstance(text, str):
                yield self._whole(prompt, text)
                if prompt:
                    yield prompt

    def _last(self, row: Mapping[str, Any]) -> str:
        return self.text if self.text in row and self.completion not in row else self.completion

    def _whole(self, prompt: str, text: str) -> str:
        if not text.strip():
            return prompt + text
        return prompt + text + ("" if text.endswith(self.tokenizer.eos_token or "") else self.end)

    def _text_row(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        prompt, text = (_text(row, name) for name in (self.prompt, self._last(row)))
        ids = self.tokens(self._whole(prompt, text))
        if not text.strip():
            return ids, [IGNORED] * len(ids)
        # A token that grew over the end of the prompt belongs to the completion.
        start = common(self.tokens(prompt), ids) if prompt else 0
        return ids, [IGNORED] * start + ids[start:]

    def _generated(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Return what the model read and what it generated."""
        asked, answer = self._question(row), list(row[OUTPUT_IDS])
        said = self.answer_in(row)
        if said is not None and said.strip() != answer_text(self.tokenizer, asked, answer).strip():
            raise UnreadableRow(
                f"`{OUTPUT_IDS}` and the answer's text {said!r} differ: drop `{OUTPUT_IDS}` to trace the text"
            )
        return [*asked, *answer], [IGNORED] * len(asked) + answer

    def _question(self, row: Mapping[str, Any]) -> list[int]:
        """Return the tokens that the model reads before its answer, of a row with or without an answer."""
        if self.messages in row:
            messages = as_messages(row[self.messages], self.messages)
            open_ = messages[-1].get("role") in ANSWERERS
            return self._chat(row).tokenize(messages if open_ else messages[:-1], asks=True)
        if isinstance(row[self.prompt], list):
            return self._chat(row).tokenize(as_messages(row[self.prompt], self.prompt), asks=True)
        ids = self.tokens(_text(row, self.prompt))
        # A tokenizer that ends every text: an answer begins before that.
        return ids[:-1] if not self.end and ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def asked_tokens(self, row: Mapping[str, Any]) -> list[int] | None:
        """Return the tokens of what a row asks, `None` where it has its answer."""
        row = {name: row[name] for name in self.columns_in(row, answered=False)}
        row = self.columns.conversation(row) or row
        if self.messages in row:
            messages = as_messages(row[self.messages], self.messages)
            return self._question(row) if messages[-1].get("role") in ANSWERERS else None
        return self._question(row) if self.prompt in row and self.completion not in row else None

    def completed(self, row: Mapping[str, Any], asked: list[int] | None, answer: list[int] | None) -> dict[str, Any]:
        """Return the columns that hold a row's answer; of a row that has one already, with `None`, as they are."""
        read = {name: row[name] for name in self.columns_in(row, answered=False)}
        read = self.columns.conversation(read) or read
        text = None if answer is None or asked is None else answer_text(self.tokenizer, asked, answer)
        if self.messages in read:
            turns = [] if text is None else [{"role": "assistant", "content": text.strip()}]
            made: dict[str, Any] = {self.messages: [*as_messages(read[self.messages], self.messages), *turns]}
        elif text is None:
            made = {self.completion: row.get(self.completion)}
        else:
            chat = isinstance(read[self.prompt], list)
            made = {self.completion: [{"role": "assistant", "content": text.strip()}] if chat else text}
        return {OUTPUT_IDS: row.get(OUTPUT_IDS) if answer is None else answer, **made}

    def with_output(self, row: Mapping[str, Any], output: Any) -> dict[str, Any]:
        """Return a row with another completion, last answer or text; with `None`, with its own."""
        row = self.columns.conversation(row) or dict(row)
        if output is None:
            return row
        if INPUT_IDS in row:
            raise ValueError(f"Rows of `{INPUT_IDS}` have no contrast: give `{self.prompt}` and `{self.completion}`.")
        other = {**row, OUTPUT_IDS: None} if OUTPUT_IDS in row else row
        if self.messages not in row:
            return {**other, self.completion if self.completion in row else self.text: output}
        messages = as_messages(row[self.messages], self.messages)
        before = messages[:-1] if messages[-1].get("role") == "assistant" else messages
        turns = [{"role": "assistant", "content": output}] if isinstance(output, str) else output
        return {**other, self.messages: [*before, *turns]}

    def answer_in(self, row: Mapping[str, Any]) -> str | None:
        """Return the text of a row's answer, `None` where it has none."""
        said = row[self.messages] if self.messages in row else row.get(self.completion)
        last = as_messages(said, self.messages)[-1] if isinstance(said, list) and said else {"content": said}
        content = last.get("content") if last.get("role") not in ANSWERERS else None
        return content if isinstance(content, str) else None

    def without_answers(self, rows: Rows) -> Rows:
        """Return rows as questions: a prompt without its completion, messages without the assistant's last."""
        asked = []
        for row in each_row(rows):
            read = {name: row[name] for name in self.columns_in(row, answered=False)}
            read = self.columns.conversation(read) or read
            if self.messages in read:
                messages = as_messages(read[self.messages], self.messages)
                read[self.messages] = messages if messages[-1].get("role") in ANSWERERS else messages[:-1]
            asked.append({k: v for k, v in read.items() if k not in (self.completion, OUTPUT_IDS, SPAN)})
        return {name: [row[name] for row in asked] for name in (asked[0] if asked else ())}

    def questions(self, items: list[Any], candidates: Dataset | None) -> Rows:
        """Return texts and conversations as rows ([`CausalLMAdapter.questions`])."""
        texts = [isinstance(item, str) for item in items]
        if all(texts) and (self.tokenizer.chat_template is None or self.is_plain(candidates)):
            return {self.prompt: items}
        turns = [[{"role": "user", "content": item}] if isinstance(item, str) else item for item in items]
        return {self.messages: turns}

    def is_plain(self, candidates: Dataset | None) -> bool:
        """Whether candidates are texts, or prompts and completions as texts."""
        first = self.columns_in(candidates.column_names)[0] if candidates is not None else self.messages
        return first in (self.text, self.prompt) and isinstance(candidates.features[first], Value)  # type: ignore[union-attr]


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise UnreadableRow(f"`{column}` holds {type(value).__name__} where a text (or a list of messages) must be")
    return value or ""


def only_span(span: str, texts: list[str], labels: list[int]) -> list[int]:
    """Return labels of which only those of a part of the text are left.

    Args:
        span (`str`): The part.
        texts (`list[str]`): The text of every token.
        labels (`list[int]`): The labels, -100 where a token does not count.

    Raises:
        UnreadableRow: If the part is not among the tokens that count.
    """
    if not isinstance(span, str):
        raise UnreadableRow(f"`{SPAN}` holds {type(span).__name__} where a text must be")
    text, ends = "".join(texts), [0, *accumulate(len(piece) for piece in texts)]
    at = text.find(span)
    while at >= 0:
        inside = [i for i, (a, b) in enumerate(pairwise(ends)) if a < at + len(span) and b > at]
        if all(labels[i] != IGNORED for i in inside):
            return [label if i in inside else IGNORED for i, label in enumerate(labels)]
        at = text.find(span, at + 1)
    said = "".join(piece for piece, label in zip(texts, labels, strict=True) if label != IGNORED)
    raise UnreadableRow(f"the span {span!r} is not in the completion {said!r}")


def cut(ids: list[int], labels: list[int], limit: int | None) -> tuple[list[int], list[int], str]:
    """Cut a row that is too long: first the beginning, up to the first token that counts, then the end.

    Returns:
        `tuple`: Tokens, labels, and which ends were cut: `"beginning"`, `"end"`, both, or nothing.
    """
    excess = 0 if limit is None else len(ids) - limit
    if excess <= 0:
        return ids, labels, ""
    first = next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))
    dropped = min(excess, max(0, first - 1))
    kept = slice(dropped, dropped + len(ids) - excess)
    lost = [name for name, is_cut in (("beginning", dropped), ("end", excess > dropped)) if is_cut]
    return ids[kept], labels[kept], " and ".join(lost)
