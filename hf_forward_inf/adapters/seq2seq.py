"""Encoder-decoder language models: mT5, T5, BART and their kin."""

from collections.abc import Callable, Set
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_forward_inf.adapters.base import Adapter, Batch, Forward, Rows
from hf_forward_inf.adapters.language import (
    CONTRASTS,
    IGNORED,
    check_language_model,
    input_of,
    longest_input,
    pad,
    pieces,
    preferred_ascent,
    tokenizer_state,
)
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import device_of, peft_parameters


class Seq2SeqAdapter(Adapter):
    """Cross-entropy of the target tokens given the input, end-of-sequence token included.

    Perturbs the decoder (and an output layer of its own) unless told otherwise: the decoder reads the fact
    out of what the encoder offers, and the encoder's output, which then depends on no query, is computed
    once for many queries.

    A query with a `contrast` (or `rejected`: another target) has the loss of its own minus that of the contrast
    ([`contrast.Contrast`]).

    Args:
        model (`transformers.PreTrainedModel`): A model with an encoder, a decoder and `labels`.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.
        input_column (`str`, defaults to `"inputs_pretokenized"`): Column of input texts (FTRACE's name).
        target_column (`str`, defaults to `"targets_pretokenized"`): Column of target texts.
        max_length (`int`, *optional*): Tokens kept of an input or target, the end token among them. Defaults
            to the model's limit.

    Raises:
        TypeError: If the model has no decoder that predicts labels.
    """

    contrast_columns = CONTRASTS

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        input_column: str = "inputs_pretokenized",
        target_column: str = "targets_pretokenized",
        max_length: int | None = None,
    ):
        super().__init__(model)
        self.model: Any = model
        check_language_model(
            model, tokenizer, is_seq2seq(model), "predict labels from an encoder's output", "AutoModelForSeq2SeqLM"
        )
        self.tokenizer = tokenizer
        self.columns = (input_column, target_column)
        self.max_length = max_length or longest_input(model, tokenizer)

    @property
    def cache_key(self) -> str:
        """Columns, length limit and the tokenizer's whole state."""
        return fingerprint(self.columns, self.max_length, tokenizer_state(self.tokenizer))

    def encode(self, rows: Rows) -> Rows:
        """Tokenize inputs and targets; a text beyond `max_length` keeps its beginning and its end token."""
        inputs, targets = (self._tokenize(rows[column], column) for column in self.columns)
        blank = [text is None or not text.strip() for text in rows[self.columns[1]]]
        return {
            "input_ids": [self._cut(ids) for ids in inputs],
            "labels": [self._cut(ids) for ids in targets],
            "terms": [0 if empty else len(self._cut(ids)) for empty, ids in zip(blank, targets, strict=True)],
            "truncated": [max(len(i), len(t)) > self.max_length for i, t in zip(inputs, targets, strict=True)],
        }

    def _tokenize(self, texts: list[str | None], column: str) -> list[list[int]]:
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise TypeError(f"Column `{column}` holds {type(text).__name__} values; it must hold text.")
        # verbose=False: transformers' own warning counts no rows; ours does, once.
        return self.tokenizer([text or "" for text in texts], verbose=False)["input_ids"]

    def _cut(self, ids: list[int]) -> list[int]:
        return ids if len(ids) <= self.max_length else [*ids[: self.max_length - 1], ids[-1]]

    def lengths(self, features: Rows | Dataset) -> np.ndarray:
        """Target length first: the decoder runs once a query, the encoder once a block of queries."""
        pairs = zip(features["labels"], features["input_ids"], strict=True)
        return np.array([(len(labels), len(ids)) for labels, ids in pairs])

    def collate(self, features: Rows) -> Batch:
        """Pad inputs with the padding token, labels with -100."""
        return {
            "input_ids": pad(features["input_ids"], self.tokenizer.pad_token_id or 0),
            "attention_mask": pad([[1] * len(ids) for ids in features["input_ids"]], 0),
            "labels": pad(features["labels"], IGNORED),
        }

    def term_losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Cross-entropy of every target token, `[rows, target tokens]`, 0 where padded."""
        logits, labels = self._logits(forward, batch).float(), batch["labels"]
        # Flat: along the last axis, the softmax is several times faster than along a middle one.
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view_as(labels)

    def _logits(self, forward: Forward, batch: Batch) -> Tensor:
        read = {key: value for key, value in batch.items() if key != "labels"}
        # Shifting the labels here, instead of passing them, keeps the model from computing its own mean loss.
        read["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return forward(**read, use_cache=False).logits

    def outputs_and_loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits of the target tokens, padding left out, `[tokens, vocabulary]`, and their cross-entropy."""
        valid = batch["labels"] != IGNORED
        targets = batch["labels"][valid]
        return self._logits(forward, batch)[valid].float(), partial(F.cross_entropy, target=targets, reduction="sum")

    def term_texts(self, features: Rows) -> list[list[str]]:
        """The text of every target token."""
        return [pieces(self.tokenizer, ids) for ids in features["labels"]]

    @torch.no_grad()
    def representation(self, batch: Batch) -> Tensor:
        """Mean of the decoder's last hidden states over the target tokens, `[rows, d_model]`."""
        states = input_of(self.model.get_output_embeddings(), lambda: self._logits(self.model, batch)).float()
        valid = (batch["labels"] != IGNORED)[..., None]
        return (states * valid).sum(1) / valid.sum(1)

    def default_modules(self) -> list[str]:
        """The decoder, and the output layer where it has weights of its own; of a PEFT model what it has trained."""
        if trained := peft_parameters(self.model):
            return trained
        names = {id(module): name for name, module in self.model.named_modules()}
        prefix = self._shared_ids()
        modules = [self.model.get_decoder(), self.model.get_output_embeddings()]
        owned = [m for m in modules if any(id(p) not in prefix for p in m.parameters())]
        return [names[id(module)] for module in owned]

    def _shared_ids(self) -> set[int]:
        return {id(parameter) for parameter in self.model.get_encoder().parameters()}

    def default_ascent(self, direction: str | None = None) -> dict[str, Any]:
        """Corrected by curvature, if the model's size allows it ([`language.preferred_ascent`])."""
        return preferred_ascent(self.model, direction)

    def shared_parameters(self) -> Set[str]:
        """Everything that the encoder reads, a tied embedding included."""
        prefix = self._shared_ids()
        return {name for name, parameter in self.model.named_parameters() if id(parameter) in prefix}

    def run_shared(self, batch: Batch) -> Batch:
        """Run the encoder."""
        encoded = self.model.get_encoder()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], return_dict=True
        )
        rest = {key: value for key, value in batch.items() if key != "input_ids"}
        return {**rest, "encoder_outputs": encoded}

    @torch.no_grad()
    def answer(self, rows: Rows, batch_size: int = 64) -> list[str]:
        """Let the model answer inputs by greedy decoding.

        Args:
            rows (`dict[str, list]`): A slice with the input column; targets are not read.
            batch_size (`int`, defaults to 64): Inputs decoded together.

        Returns:
            `list[str]`: One target text a row, sentinels kept, padding and end tokens dropped.
        """
        encoded = [self._cut(ids) for ids in self._tokenize(rows[self.columns[0]], self.columns[0])]
        special = {self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, self.tokenizer.bos_token_id}
        device = device_of(self.model)
        answers: list[str] = []
        for start in range(0, len(encoded), batch_size):
            chunk = encoded[start : start + batch_size]
            batch = self.collate({"input_ids": chunk, "labels": chunk})
            generated = self.model.generate(
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                max_new_tokens=min(64, self.max_length),
                do_sample=False,
                num_beams=1,
            )
            kept = [[token for token in row if token not in special] for row in generated.tolist()]
            answers += self.tokenizer.batch_decode(kept)
        return [answer.strip() for answer in answers]


def is_seq2seq(model: Any) -> bool:
    """Whether a model encodes an input and predicts labels with a decoder."""
    has_labels = hasattr(model, "prepare_decoder_input_ids_from_labels")
    return has_labels and model.get_output_embeddings() is not None
