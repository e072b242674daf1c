"""Models that classify the words of a text: named entities, parts of speech."""

from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from hf_forward_inf.adapters.base import Rows
from hf_forward_inf.adapters.labels import OneClass, class_names, only, replaced
from hf_forward_inf.adapters.language import IGNORED, pieces
from hf_forward_inf.adapters.text_inputs import is_of_kind, unreadable
from hf_forward_inf.adapters.token_labels import TokenLabelsAdapter
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import evaluating, to_device

LABELS = ("ner_tags", "labels", "tags")
"""Columns of the labels of words."""


class TokenClassificationAdapter(TokenLabelsAdapter):
    """Cross-entropy of the labels of a text's words.

    Rows have `tokens`, a list of words, and `ner_tags` (or `labels`, `tags`), a class for each, as in transformers'
    examples: a word's label counts for its first token, and a label of -100 nowhere. Classes go by name where both the
    column and the model name them ([`ClassifierAdapter`]).

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): Loaded with `AutoModelForTokenClassification`.
        tokenizer (`transformers.PreTrainedTokenizerFast`): Its tokenizer, which knows the word of each token.
        words_column (`str`, defaults to `"tokens"`): Column of words.
        label_column (`str`, *optional*): Column of labels. Defaults to the names above.
        label_all_tokens (`bool`, defaults to `False`): Whether a word's label counts for all its tokens.
        max_length (`int`, *optional*): Tokens kept of a row. Defaults to the model's limit.

    Raises:
        TypeError: If the model does not classify tokens, or the tokenizer is not a fast one.

    Example:
        >>> tracer = ForwardInf(AutoModelForTokenClassification.from_pretrained(name), tokenizer)
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        words_column: str = "tokens",
        label_column: str | None = None,
        label_all_tokens: bool = False,
        max_length: int | None = None,
    ):
        if not is_token_classifier(model):
            raise TypeError(f"{type(model).__name__} has no head for token classification.")
        super().__init__(model, tokenizer, max_length)
        if not tokenizer.is_fast:
            raise TypeError(f"{type(tokenizer).__name__} does not know the word of a token: use a fast tokenizer.")
        self.label_columns = LABELS if label_column is None else (label_column,)
        self.columns = (words_column, self.label_columns[0])
        self.label_all_tokens = label_all_tokens

    @property
    def labels(self) -> OneClass:
        """The classes of words."""
        config: Any = self.model.config
        return OneClass(config.num_labels, class_names(config))

    @property
    def cache_key(self) -> str:
        """Columns, which tokens count, and how words are tokenized."""
        return fingerprint(self.columns, self.label_columns, self.label_all_tokens, self.inputs.cache_key)

    def columns_in(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the columns of words and labels."""
        return (self.columns[0], only(self.label_columns, list(names), "labels"))

    def prepare(self, rows: Dataset) -> Dataset:
        """Check all labels first, and number classes as the model does.

        Raises:
            ValueError: If there is a label that the model can't have. It names the rows.
        """
        column = self.columns_in(rows.column_names)[1]
        values = rows.with_format(None)[column][:]
        return replaced(rows, column, self.labels.read_lists(values, rows.features[column], column))

    def encode(self, rows: Rows) -> Rows:
        """Tokenize words, and give their labels to their tokens; `unreadable` says which rows can't be read."""
        column = self.columns[0]
        why = unreadable(rows[column], column, words=True)
        words = [[] if reason else value for value, reason in zip(rows[column], why, strict=True)]
        given = [value or [] for value in rows[only(self.label_columns, list(rows), "labels")]]
        for i, (row, labels) in enumerate(zip(words, given, strict=True)):
            if labels and not why[i] and len(row) != len(labels):
                why[i] = f"it has {len(row)} words and {len(labels)} labels"
        found, encoded = self.inputs.encode(words, words=True)
        labels = [self._by_token(encoded.word_ids(i), own if not why[i] else []) for i, own in enumerate(given)]
        terms = [sum(label != IGNORED for label in row) for row in labels]
        return {**found, "labels": labels, "terms": terms, "unreadable": why}

    def _by_token(self, words: list[int | None], labels: list[int]) -> list[int]:
        """Return the label of each token, given the number of its word."""
        before = [None, *words[:-1]]
        return [
            labels[word] if labels and word is not None and (word != last or self.label_all_tokens) else IGNORED
            for word, last in zip(words, before, strict=True)
        ]

    def term_texts(self, features: Rows) -> list[list[str]]:
        """Return the text of every token."""
        return [pieces(self.inputs.tokenizer, ids) for ids in features["input_ids"]]

    def _are_several(self, inputs: Any) -> bool:
        words = isinstance(inputs, list | tuple) and all(isinstance(word, str) for word in inputs)
        return super()._are_several(inputs) and not words

    @torch.no_grad()
    def answer(self, rows: Rows) -> list[list[int]]:
        """Classify the words of rows that have no labels yet.

        Args:
            rows (`dict[str, list]`): With the column of words.

        Returns:
            `list[list[int]]`: The most probable class of each word; -100 for words beyond the model's limit.
        """
        answers = []
        with evaluating(self.model):
            for words in rows[self.columns[0]]:
                features, encoded = self.inputs.encode([words], words=True)
                batch = to_device(self.inputs.collate(features), self.model)
                best = self.inputs.run(self.model, batch)[0].argmax(-1).tolist()
                owners = encoded.word_ids(0)
                answers.append([best[owners.index(i)] if i in owners else IGNORED for i in range(len(words))])
        return answers


def is_token_classifier(model: Any) -> bool:
    """Whether this is a transformers model that classifies tokens."""
    return is_of_kind(model, "ForTokenClassification")
