"""How a model that reads whole texts gets its input: tokens, segments, padding."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn
from typing_extensions import Self

from hf_forward_inf.adapters.base import Adapter, Batch, Forward, Rows
from hf_forward_inf.adapters.labels import only
from hf_forward_inf.adapters.language import embeddings, longest_input, pad, tokenizer_state
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import peft_parameters, without_peft

UNKNOWN = {"bbox": "boxes on a page", "pixel_values": "images", "visual_embeds": "images"}
"""Inputs of models that read more than text, and what they are."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What a model is given of a batch."""


class TextInputs:
    """Tokenizes texts, or pairs of them, and runs a model on batches that are padded on the right.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): Reads `input_ids`.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.
        max_length (`int`, *optional*): Tokens kept of a row. Defaults to the model's limit.

    Raises:
        TypeError: If there is no tokenizer, or the model reads more than text.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_length: int | None = None):
        name = type(without_peft(model)).__name__
        if tokenizer is None:
            raise TypeError(f"{name} needs its tokenizer: ForwardInf(model, tokenizer).")
        self.arguments = set(inspect.signature(without_peft(model).forward).parameters)
        if more := [what for argument, what in UNKNOWN.items() if argument in self.arguments]:
            raise TypeError(f"{name} reads {more[0]} besides text, which is not supported: write an adapter.")
        self.model: Any = model
        self.tokenizer = tokenizer
        self.max_length = max_length or _limit(model, tokenizer)

    @property
    def cache_key(self) -> str:
        """Length limit, side of the cut, and the tokenizer's whole state."""
        return fingerprint(
            self.max_length, self.tokenizer.truncation_side, self.filler, tokenizer_state(self.tokenizer)
        )

    @property
    def filler(self) -> int:
        """The token that pads: some models find the end of a text by it."""
        config = getattr(self.model.config, "get_text_config", lambda: self.model.config)()
        known = (getattr(config, "pad_token_id", None), self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in known if token is not None), 0)

    def encode(self, *texts: Sequence[Any], words: bool = False) -> tuple[Rows, Any]:
        """Tokenize rows as transformers' examples do: `tokenizer(text, pair, truncation=True)`.

        Args:
            *texts (`list`): One column of texts, or two: the parts of pairs.
            words (`bool`, defaults to `False`): Whether texts are lists of words.

        Returns:
            `tuple`: Features (`input_ids`, `token_type_ids` where the model reads them, `truncated`), and what the
            tokenizer returned.
        """
        options: dict[str, Any] = {"is_split_into_words": words, "verbose": False}
        given = [list(column) for column in texts]
        encoded = self.tokenizer(*given, **options)
        longer = [False] * len(given[0])
        if self.max_length is not None:
            longer = [len(ids) > self.max_length for ids in encoded["input_ids"]]
            if any(longer):
                encoded = self.tokenizer(*given, truncation=True, max_length=self.max_length, **options)
        self._check_vocabulary(encoded["input_ids"])
        found = {"input_ids": encoded["input_ids"], "truncated": longer}
        if "token_type_ids" in encoded and "token_type_ids" in self.arguments:
            found["token_type_ids"] = encoded["token_type_ids"]
        return found, encoded

    def _check_vocabulary(self, ids: list[list[int]]) -> None:
        size, highest = embeddings(self.model), max((max(row, default=0) for row in ids), default=0)
        if highest >= size:
            raise ValueError(
                f"The tokenizer returns token {highest}, and the model has {size} embeddings: give the tokenizer that "
                "the model was trained with, or resize_token_embeddings."
            )

    def lengths(self, ids: list[list[int]]) -> np.ndarray:
        """Return the number of tokens of each row, `[rows, 1]`."""
        return np.array([[len(row)] for row in ids])

    def collate(self, features: Rows) -> Batch:
        """Pad on the right."""
        ids, segments = features["input_ids"], features.get("token_type_ids")
        batch = {"input_ids": pad(ids, self.filler), "attention_mask": pad([[1] * len(row) for row in ids], 0)}
        return batch if segments is None else {**batch, "token_type_ids": pad(segments, 0)}

    def run(self, forward: Forward, batch: Batch) -> Tensor:
        """Run the model: its logits, `[rows, ...]`."""
        inputs = {name: value for name, value in batch.items() if name in self.arguments and name in INPUTS}
        options = {"use_cache": False} if "use_cache" in self.arguments else {}
        return forward(**inputs, **options).logits

    def with_model(self, model: nn.Module) -> Self:
        """Return the same for another model of the same architecture."""
        other = copy.copy(self)
        other.model = model
        return other


class AnswersTexts(Adapter):
    """What adapters share whose models answer texts: queries without an answer get the model's own."""

    answers_queries = True
    label_columns: tuple[str, ...]
    """Names that the column of answers may have."""
    inputs: TextInputs

    def with_model(self, model: nn.Module) -> Self:
        """Return the same adapter for another model of the same architecture."""
        other = super().with_model(model)
        other.inputs = self.inputs.with_model(other.model)
        return other

    def default_modules(self) -> list[str]:
        """What a PEFT model has trained, else everything."""
        return peft_parameters(self.model) or ["all"]

    def rows_for(self, inputs: Any, candidates: Dataset | None = None) -> Rows:
        """Return what a user asks as rows without answers.

        Args:
            inputs: A text or a row (`dict`), or a list of one of these.
            candidates (`datasets.Dataset`, *optional*): What they are traced over: they name the column of texts.

        Raises:
            TypeError: If it is something else, or the rows have not all the same columns.
        """
        column = self.columns[0]
        if candidates is not None:
            first = self.columns_in(candidates.column_names)[0]
            column = column if first in ("chosen", "prompt") else first
        items = inputs if self._are_several(inputs) else [inputs]
        rows = [dict(item) if isinstance(item, Mapping) else {column: item} for item in items]
        if any(row.keys() != rows[0].keys() for row in rows):
            raise TypeError("Queries are all texts, or all rows of the same columns.")
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _are_several(self, inputs: Any) -> bool:
        if not isinstance(inputs, str | Mapping | Sequence):
            raise TypeError(f"A query is a text or a row (dict), not {type(inputs).__name__}.")
        return not isinstance(inputs, str | Mapping)

    def is_open(self, row: Mapping[str, Any], column: str) -> bool:
        """Whether a row has no answer yet, in this column."""
        return row.get(column) is None

    def with_answers(self, queries: Dataset, **options: Any) -> Dataset:
        """Return the queries with the model's answers where they have none, by [`answer`] with its options."""
        column = only(self.label_columns, queries.column_names, "label")
        open_ = [i for i, row in enumerate(queries) if self.is_open(row, column)]
        if not open_:
            return queries
        if column in queries.column_names:
            queries = self.prepare(queries)
        values = queries[column][:] if column in queries.column_names else [None] * len(queries)
        plain = queries.remove_columns(column) if column in queries.column_names else queries
        for i, answer in zip(open_, self.answer(plain.select(open_)[:], **options), strict=True):
            values[i] = answer
        return plain.add_column(column, values)


def is_of_kind(model: Any, kind: str) -> bool:
    """Whether this is a transformers model with a head of a kind, such as `"ForMaskedLM"`, perhaps in a PEFT model."""
    return kind in type(without_peft(model)).__name__


def unreadable(values: Sequence[Any], column: str, words: bool = False) -> list[str]:
    """Return why values can't be read as texts (or as lists of words), for each; empty where they can."""
    reasons = []
    for value in values:
        fits = isinstance(value, list) and all(isinstance(one, str) for one in value)
        held = "nothing" if value is None else f"a {type(value).__name__}"
        reason = f"`{column}` holds {held}, not a {'list of words' if words else 'text'}"
        reasons.append("" if (fits if words else isinstance(value, str)) else reason)
    return reasons


def _limit(model: Any, tokenizer: Any) -> int | None:
    """Return the number of tokens that the model reads, where something states it."""
    positions = [
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and "position_embeddings" in name and module.padding_idx is not None
    ]
    part = "encoder" if getattr(model.config, "is_encoder_decoder", False) else "decoder"
    limits = [limit for limit in (longest_input(model.config, tokenizer, part), *positions) if limit is not None]
    return min(limits, default=None)
