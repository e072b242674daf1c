"""Reward models: sequence classifiers with one output, trained on pairs of answers."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_forward_inf.adapters.base import Batch, Forward, Rows
from hf_forward_inf.adapters.chat import ChatTemplate, as_messages
from hf_forward_inf.adapters.columns import TEMPLATE, UnreadableRow, read_rows
from hf_forward_inf.adapters.labels import LabelKind, OneClass
from hf_forward_inf.adapters.sequence_classification import SequenceClassificationAdapter, is_sequence_classifier
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import without_peft

PAIR = ("chosen", "rejected")
"""Columns of the two answers."""
FURTHER = ("prompt", "margin", *TEMPLATE)
"""Columns that a pair may have besides, as TRL's trainer reads them."""
IDS = "rejected_ids"
"""Feature: tokens of the rejected answer."""
REJECTED = "rejected_"
"""Begins the names of what is collated of the rejected answer."""
CHOICE = OneClass(2, {"chosen": 0, "rejected": 1})
"""A pair is a choice between its two rewards: its Bradley-Terry loss is their cross-entropy."""


class RewardAdapter(SequenceClassificationAdapter):
    """The Bradley-Terry loss of a pair of answers, -log sigmoid(reward of the chosen - reward of the rejected).

    Rows have the columns of TRL's `RewardTrainer`, and are tokenized as it does it: `chosen` and `rejected`, as texts
    or as lists of messages, `prompt` where it is not part of them, and, where there are, `margin`, `tools` and
    `chat_template_kwargs`. Rows with a text and a `label` have the squared error of the reward instead, as every
    sequence classifier with one output ([`SequenceClassificationAdapter`], whose arguments it has).

    Rows with an answer of more than `max_length` tokens are refused; TRL's trainer leaves them out.

    Example:
        >>> tracer = ForwardInf(AutoModelForSequenceClassification.from_pretrained(name, num_labels=1), tokenizer)
        >>> found = tracer.trace(preferences_to_explain, preferences)
    """

    @property
    def cache_key(self) -> str:
        """As for every classifier of texts."""
        return fingerprint("reward", super().cache_key)

    def columns_in(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the columns of pairs, else those of a text and its label."""
        names = list(names)
        if set(PAIR) <= set(names):
            return (*(name for name in FURTHER if name in names), *PAIR)
        return super().columns_in(names)

    def meant(self, features: Mapping[str, Any]) -> dict[str, str]:
        """Return nothing: texts of other names may be one of a pair."""
        return {}

    def prepare(self, rows: Dataset) -> Dataset:
        """Check labels where there are any."""
        return rows if set(PAIR) <= set(rows.column_names) else super().prepare(rows)

    def is_open(self, row: Mapping[str, Any], column: str) -> bool:
        """Whether a row has no answer: pairs are whole."""
        return not set(PAIR) <= row.keys() and super().is_open(row, column)

    def encode(self, rows: Rows) -> Rows:
        """Tokenize both answers; `unreadable` says which rows can't be read."""
        if not set(PAIR) <= set(rows):
            return super().encode(rows)
        return read_rows(rows, self._pair, {"input_ids": [], IDS: [], "margin": 0.0, "terms": 0, "truncated": False})

    def _pair(self, row: dict[str, Any]) -> dict[str, Any]:
        chosen, rejected = (self._tokens(row, name) for name in PAIR)
        margin, most, longest = row.get("margin"), self.inputs.max_length, max(len(chosen), len(rejected))
        if most is not None and longest > most:
            raise UnreadableRow(f"it has {longest} tokens, and the model reads {most}")
        read = {"input_ids": chosen, IDS: rejected, "margin": 0.0 if margin is None else float(margin)}
        return {**read, "terms": 1, "truncated": False}

    def _tokens(self, row: dict[str, Any], name: str) -> list[int]:
        prompt, tokenizer = row.get("prompt"), self.inputs.tokenizer
        answer: Any = row[name]
        if not isinstance(answer, str | list) or not (prompt is None or type(prompt) is type(answer)):
            raise UnreadableRow(f"`{name}` must be a text or a list of messages, and `prompt` of the same kind")
        if isinstance(answer, list):
            before = [] if prompt is None else as_messages(prompt, "prompt")
            return ChatTemplate(tokenizer, row).tokenize([*before, *as_messages(answer, name)])
        whole, end = f"{prompt or ''}{answer}", tokenizer.eos_token or ""
        return tokenizer(whole if whole.endswith(end) else whole + end, verbose=False)["input_ids"]

    def lengths(self, features: Rows | Dataset) -> np.ndarray:
        """Return the number of tokens of each answer, `[rows, 2]`; of texts with labels, `[rows, 1]`."""
        found = super().lengths(features)
        if IDS not in _names(features):
            return found
        return np.concatenate([found, self.inputs.lengths(features[IDS][:])], axis=1)

    def collate(self, features: Rows) -> Batch:
        """Pad each of the answers on the right."""
        if IDS not in features:
            return super().collate(features)
        rejected = self.inputs.collate({"input_ids": features[IDS]})
        return {
            **self.inputs.collate({"input_ids": features["input_ids"]}),
            **{REJECTED + name: value for name, value in rejected.items()},
            "margin": torch.tensor(features["margin"]),
            **CHOICE.collate([0] * len(features["margin"])),
        }

    def labels_of(self, batch: Batch) -> LabelKind:
        """A choice for pairs; else numbers."""
        return CHOICE if f"{REJECTED}input_ids" in batch else self.labels

    def logits(self, forward: Forward, batch: Batch) -> Tensor:
        """Run the model: the rewards of both answers, margin taken off the first, `[rows, 2]`; else `[rows, 1]`."""
        rewards = super().logits(forward, batch)
        if f"{REJECTED}input_ids" not in batch:
            return rewards
        other = {name.removeprefix(REJECTED): value for name, value in batch.items() if name.startswith(REJECTED)}
        return torch.cat([rewards - batch["margin"][:, None].to(rewards.dtype), super().logits(forward, other)], dim=1)

    def sampled_output_gradients(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Compute the loss's gradient by the outputs, for preferences or numbers drawn from the predictions."""
        return (CHOICE if outputs.shape[1] == 2 else self.labels).sampled(outputs, generator)

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return how far each prediction has moved: of pairs, the probability that the chosen answer is better."""
        return (CHOICE if before.shape[1] == 2 else self.labels).divergence(before, after)

    def representation(self, batch: Batch) -> Tensor:
        """Return what the last layer reads; of pairs, for the chosen answer less that for the rejected."""
        plain = {name: value for name, value in batch.items() if not name.startswith(REJECTED)}
        found = super().representation(plain)
        if f"{REJECTED}input_ids" not in batch:
            return found
        other = {name.removeprefix(REJECTED): value for name, value in batch.items() if name.startswith(REJECTED)}
        return found - super().representation(other)

    def term_texts(self, features: Rows) -> list[list[str]]:
        """Return what the one term of a row's loss stands for."""
        return (
            [["chosen, not rejected"]] * len(features["terms"])
            if "margin" in features
            else super().term_texts(features)
        )


def is_reward_model(model: Any) -> bool:
    """Whether this is a sequence classifier with one output."""
    return is_sequence_classifier(model) and getattr(without_peft(model).config, "num_labels", 0) == 1


def _names(features: Rows | Dataset) -> list[str]:
    return features.column_names if isinstance(features, Dataset) else list(features)
