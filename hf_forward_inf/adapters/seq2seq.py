"""Encoder-decoder language models: mT5, T5, BART, NLLB and their kin."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import MoEModelOutput

from hf_forward_inf.adapters.base import Batch, Forward, Rows
from hf_forward_inf.adapters.columns import (
    CHANGES_THE_PROMPT,
    IGNORED,
    INPUT_IDS,
    LABELS,
    OUTPUT_IDS,
    PAIRS,
    PICTURES,
    UnreadableRow,
    integers,
    pretokenized,
    read_rows,
    refuse_pictures,
)
from hf_forward_inf.adapters.language import (
    LanguageAdapter,
    check_language_model,
    check_tokenizer,
    counted,
    embeddings,
    inputs_of,
    longest_input,
    pad,
    pieces,
    tokenizer_state,
)
from hf_forward_inf.adapters.naming import lone_question, pair_of
from hf_forward_inf.adapters.tokens import Tokens
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import evaluating, peft_parameters, to_device, uncompiled

KNOWN: tuple[tuple[str, str], ...] = (("prompt", "completion"), *PAIRS, (INPUT_IDS, LABELS))
"""Pairs of columns that are read besides the adapter's own."""


class Seq2SeqAdapter(LanguageAdapter):
    """Cross-entropy of the target tokens given the input, end-of-sequence token included.

    Perturbs the decoder (and an output layer of its own) unless other modules are named: the decoder reads the fact
    out of what the encoder offers, and the encoder's output, which then depends on no query, is computed once for many
    queries.

    Rows have an input and a target, as texts, or tokens in `input_ids` and `labels`, which are taken as they are.
    Targets are tokenized as such (`text_target`), in the target language where the tokenizer has one. Queries without
    a target are answered by the model ([`LanguageAdapter.with_answers`]).

    A query with a `contrast` (or `rejected`: another target) has the loss of its own minus that of the contrast
    ([`contrast.Contrast`]).

    Args:
        model (`transformers.PreTrainedModel`): A model with an encoder and a decoder of texts.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.
        input_column (`str`, defaults to `"inputs_pretokenized"`): Column of input texts (FTRACE's name).
        target_column (`str`, defaults to `"targets_pretokenized"`): Column of target texts.
        max_length (`int`, *optional*): Tokens read of an input or target, the end token among them. Defaults to the
            limits that the model's configuration or the tokenizer states, if they do.

    Raises:
        TypeError: If the model has no decoder that predicts texts, or no encoder that reads them.
    """

    decodes = True
    default_strategy: Literal["full", "screen"] = "screen"
    blank: ClassVar[dict[str, Any]] = {**LanguageAdapter.blank, "decoder_input_ids": []}

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        input_column: str = "inputs_pretokenized",
        target_column: str = "targets_pretokenized",
        max_length: int | None = None,
    ):
        model = uncompiled(model)
        check_language_model(
            model, tokenizer, is_seq2seq(model), "predict labels from an encoder's output", "AutoModelForSeq2SeqLM"
        )
        super().__init__(model, tokenizer)
        if self.model.main_input_name != "input_ids":
            raise TypeError(
                f"{type(model).__name__} reads {self.model.main_input_name}, not texts: no adapter knows such a "
                "model. Write one (hf_forward_inf.adapters.Adapter)."
            )
        check_tokenizer(model, tokenizer)
        self.inputs, self.targets = Tokens(tokenizer), Tokens(tokenizer, "text_target")
        self.columns = (input_column, target_column)
        self.max_length = max_length or longest_input(self.model.config, tokenizer, "encoder")
        self.max_target_length = max_length or longest_input(self.model.config, tokenizer, "decoder")
        self.batches: bool | None = None  # whether rows of different lengths can be batched, once that was tried
        # What the tokenizer puts around every target: a language, an end token.
        self.around_targets = list(tokenizer(text_target="")["input_ids"])

    @property
    def cache_key(self) -> str:
        """Columns, limits, what the decoder starts with, and the tokenizer's whole state."""
        names = ("decoder_start_token_id", "pad_token_id")
        start = (type(self.model).__name__, *(getattr(self.model.config, name, None) for name in names))
        limits = (self.max_length, self.max_target_length, embeddings(self.model))
        return fingerprint(self.columns, limits, start, self.around_targets, tokenizer_state(self.tokenizer))

    def columns_in(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the columns to read of rows that have columns of these names.

        Raises:
            ValueError: If they have no input and target, or it is unclear which columns those are.
        """
        names = list(names)
        pairs = [pair for pair in (self.columns, *KNOWN[:-1]) if set(pair) <= set(names)]
        if {INPUT_IDS, LABELS} <= set(names):
            return (INPUT_IDS, *(name for name in ("attention_mask",) if name in names), LABELS)
        other = self.columns not in pairs
        if other and (len(pairs) != 1 or set(CHANGES_THE_PROMPT) & set(names)):
            raise ValueError(
                f"Rows need columns `{self.columns[0]}` and `{self.columns[1]}`; these have {', '.join(names)}. "
                "Rename them, or name yours: Seq2SeqAdapter(model, tokenizer, input_column=..., target_column=...), "
                "on the command line --input_column and --target_column."
            )
        return (*(name for name in (OUTPUT_IDS, *PICTURES) if name in names), *pairs[0])

    def meant(self, features: Mapping[str, Any]) -> dict[str, str]:
        """Return the columns of another pair of names as input and target."""
        known = self.columns[0] in features or any(set(pair) <= set(features) for pair in KNOWN)
        pair = None if known else pair_of(features)
        return {} if pair is None else dict(zip(pair, self.columns, strict=True))

    def only_asked(self, names: Iterable[str]) -> str | None:
        """Return the column of inputs, of queries without targets."""
        return None if self.columns[0] in names else lone_question(names)

    @torch.no_grad()
    def _padding_counts(self) -> bool:
        """Whether predictions change with a later token, beyond rounding."""
        special = {*self.tokenizer.all_special_ids, self.model.config.pad_token_id}
        plain = [token for token in range(min(len(self.tokenizer), embeddings(self.model))) if token not in special][
            :4
        ]
        if len(plain) < 2:
            return False
        ids = to_device({"ids": torch.tensor([plain])}, self.model)["ids"]
        with evaluating(self.model):
            short, whole = (
                self.model(input_ids=ids, decoder_input_ids=ids[:, :stop], use_cache=False).logits[:, :-1].float()
                for stop in (-1, ids.shape[1])
            )
        return not torch.allclose(short, whole[:, : short.shape[1]], rtol=1e-2, atol=1e-3 * float(whole.abs().max()))

    def encode(self, rows: Rows) -> Rows:
        """Tokenize inputs and targets; a text beyond the limit keeps its beginning and its end token.

        Raises:
            TypeError: If the model's losses depend on padding.
        """
        self._check_padding()
        *_, source, target = columns = self.columns_in(rows)
        if source not in (self.columns[0], INPUT_IDS, "attention_mask"):
            self.say_once(f"`{source}` is read as the model's input, `{target}` as its target.")
        read = {name: rows[name] for name in columns}
        plain = source not in (INPUT_IDS, "attention_mask")
        with (
            self.inputs.together(_texts(read[source]) if plain else ()),
            self.targets.together(_texts(read[target]) if plain else ()),
        ):
            return read_rows(read, self._features, self.blank)

    def _check_padding(self) -> None:
        if self.batches is None:
            self.batches = not self._padding_counts()
        if not self.batches:
            raise TypeError(
                f"{type(self.model).__name__} predicts a target's tokens otherwise where more tokens follow, be it "
                "padding: losses would depend on the other rows of a batch, so it can't be traced."
            )

    def _features(self, row: dict[str, Any]) -> dict[str, Any]:
        decoder: list[int] | None = None
        refuse_pictures(row)
        if INPUT_IDS in row:
            ids, _ = pretokenized({name: row[name] for name in row if name != LABELS})
            labels = _without_padding(integers(row[LABELS], LABELS))
        else:
            (source, text), (target, answer) = list(row.items())[-2:]
            ids, labels = self._tokens(text, source), self._tokens(answer, target, is_target=True)
            if row.get(OUTPUT_IDS) is not None:
                labels = list(row[OUTPUT_IDS])
                if self._text(labels).strip() != (answer or "").strip():
                    raise UnreadableRow(
                        f"`{OUTPUT_IDS}` and the answer's text {answer!r} differ: drop the column `{OUTPUT_IDS}` to "
                        "trace the text"
                    )
                decoder = [self._start(), *labels[:-1]]
            elif not (answer or "").strip():
                labels = [IGNORED] * len(labels)
        self.check_vocabulary([*ids, *(label for label in labels if label != IGNORED)])
        long = [_beyond(ids, self.max_length), _beyond(labels, self.max_target_length)]
        ids, labels = _cut(ids, self.max_length), _cut(labels, self.max_target_length)
        return {
            "input_ids": ids,
            "labels": labels,
            "decoder_input_ids": self._shifted(labels) if decoder is None else decoder[: len(labels)],
            "terms": counted(labels),
            "truncated": "end" if any(long) else "",
        }

    def _tokens(self, text: Any, column: str, is_target: bool = False) -> list[int]:
        if text is not None and not isinstance(text, str):
            raise UnreadableRow(f"`{column}` holds {type(text).__name__} where a text must be")
        return (self.targets if is_target else self.inputs)(text or "")

    def _shifted(self, labels: list[int]) -> list[int]:
        """Return what the decoder reads to predict labels: as the model itself does, or begun by its start token."""
        shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None:
            with suppress(AttributeError, ValueError):  # a configuration without what the decoder starts with
                return [int(token) for token in shift(labels=torch.tensor([labels]))[0]]
        filled = [self.padding if label == IGNORED else label for label in labels]
        return [self._start(), *filled[:-1]]

    def _start(self) -> int:
        for config in (getattr(self.model, "generation_config", None), self.model.config):
            if (start := getattr(config, "decoder_start_token_id", None)) is not None:
                return int(start)
        raise ValueError(f"{type(self.model).__name__} has no decoder_start_token_id: set it in the model's config.")

    def lengths(self, features: Rows | Dataset) -> np.ndarray:
        """Return the lengths, targets first: the decoder runs once a query, the encoder once a block of queries."""
        pairs = zip(features["labels"], features["input_ids"], strict=True)
        return np.array([(len(labels), len(ids)) for labels, ids in pairs])

    def collate(self, features: Rows) -> Batch:
        """Pad inputs with the padding token, labels with -100."""
        return {
            "input_ids": pad(features["input_ids"], self.padding),
            "attention_mask": pad([[1] * len(ids) for ids in features["input_ids"]], 0),
            "decoder_input_ids": pad(features["decoder_input_ids"], self.padding),
            "labels": pad(features["labels"], IGNORED),
        }

    def term_losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Return the cross-entropy of every target token, `[rows, target tokens]`, 0 where padded."""
        logits, labels = self._logits(forward, batch).float(), batch["labels"]
        # Flat: along the last axis, the softmax is several times faster than along a middle one.
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view_as(labels)

    def _logits(self, forward: Forward, batch: Batch) -> Tensor:
        # Without labels: with them, the model would compute its own mean loss besides.
        return forward(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits

    def outputs_and_loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the logits of the target tokens without padding, `[tokens, vocabulary]`, and their cross-entropy."""
        valid = batch["labels"] != IGNORED
        targets = batch["labels"][valid]
        return self._logits(forward, batch)[valid].float(), partial(F.cross_entropy, target=targets, reduction="sum")

    def term_texts(self, features: Rows) -> list[list[str]]:
        """Return the text of every target token."""
        filled = [[self.padding if label == IGNORED else label for label in ids] for ids in features["labels"]]
        return [pieces(self.tokenizer, ids) for ids in filled]

    def representation(self, batch: Batch) -> Tensor:
        """Return the mean of the decoder's last hidden states over the target tokens, `[rows, d_model]`."""
        return self.loss_and_representation(batch)[1]

    @torch.no_grad()
    def loss_and_representation(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return losses and representations of one run."""
        with inputs_of(self.model.get_output_embeddings()) as read:
            losses = self.loss(self.model, batch)
        valid = (batch["labels"] != IGNORED)[..., None]
        return losses, (read[-1].float() * valid).sum(1) / valid.sum(1)

    def default_ascent(self, direction: str | None = None) -> dict[str, Any]:
        """That of language models, with a step of 1.5: recall of many proponents asks for a longer one.

        Of three sets of facts, lengths 1 / 1.5 / 2 find .54 / .56 / .57, .67 / .67 / .68 and .42 / .43 / - of the
        proponents among the first 10; the LDS of the tiny mT5 is .649 / .645 / .633.
        """
        chosen = super().default_ascent(direction)
        return chosen | ({"radius": 1.5} if "radius" in chosen else {})

    def default_modules(self) -> list[str]:
        """Return the decoder, and an output layer with weights of its own; of a PEFT model what it has trained."""
        if trained := peft_parameters(self.model):
            return trained
        names = {id(module): name for name, module in self.model.named_modules()}
        prefix = self._shared_ids()
        modules = [self.model.get_decoder(), self.model.get_output_embeddings()]
        owned = [m for m in modules if any(id(p) not in prefix for p in m.parameters())]
        return [names[id(module)] for module in owned]

    def _shared_ids(self) -> set[int]:
        return {id(parameter) for parameter in self.model.get_encoder().parameters()}

    def shared_parameters(self) -> Set[str]:
        """Return the parameters that the encoder reads, a tied embedding included."""
        prefix = self._shared_ids()
        return {name for name, parameter in self.model.named_parameters() if id(parameter) in prefix}

    def run_shared(self, batch: Batch) -> Batch:
        """Run the encoder."""
        encoded = self.model.get_encoder()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], return_dict=True
        )
        rest = {key: value for key, value in batch.items() if key != "input_ids"}
        return {**rest, "encoder_outputs": encoded}

    def shared_lengths(self, lengths: np.ndarray) -> np.ndarray | None:
        """Return the encoder's positions."""
        return lengths[:, 1]

    def shared_states(self, batch: Batch) -> Tensor:
        """Return the encoder's output."""
        return batch["encoder_outputs"][0]

    def with_states(self, batch: Batch, states: Tensor) -> Batch:
        """Return the batch with the encoder's output in place of its inputs."""
        rest = {key: value for key, value in batch.items() if key != "input_ids"}
        return {**rest, "encoder_outputs": MoEModelOutput(last_hidden_state=states)}  # experts read its other fields

    def with_outputs(self, rows: Rows, outputs: list[Any]) -> Rows:
        """Return the rows with other targets."""
        target = self.columns_in(rows)[-1]
        changed = [output is not None for output in outputs]
        made = {name: [None if new else own for own, new in zip(values, changed, strict=True)]
                for name, values in rows.items() if name == OUTPUT_IDS}  # fmt: skip
        pairs = zip(rows[target], outputs, strict=True)
        return {**rows, **made, target: [own if other is None else other for own, other in pairs]}

    def questions(self, items: list[Any], candidates: Dataset | None) -> Rows:
        """Return texts as rows without targets."""
        if not all(isinstance(item, str) for item in items):
            raise TypeError(f"{type(self.model).__name__} reads texts, not conversations.")
        return {self.columns[0]: items}

    def asked(self, row: dict[str, Any]) -> list[int] | None:
        """Return the tokens of an input that has no target, `None` of other rows."""
        if self.columns[0] not in row or self.columns[1] in row or LABELS in row:
            return None
        return _cut(self._tokens(row[self.columns[0]], self.columns[0]), self.max_length)

    def completed(self, row: dict[str, Any], asked: list[int] | None, answer: list[int] | None) -> dict[str, Any]:
        """Return the columns that hold a row's answer: its text and its tokens."""
        return {OUTPUT_IDS: answer, self.columns[1]: self._text(answer or [])}

    def limit_of_answer(self, asked: list[int]) -> int | None:
        """Return how many tokens the decoder reads."""
        return self.max_target_length

    @property
    def generation_options(self) -> dict[str, Any]:
        """Make answers begin with the target language, where the tokenizer has one that comes first."""
        first = self.around_targets[:1]
        has_language = getattr(self.tokenizer, "tgt_lang", None) and first != [self.tokenizer.eos_token_id]
        return {"forced_bos_token_id": first[0]} if has_language and first else {}

    def _text(self, answer: list[int]) -> str:
        """Return an answer as text: sentinels stay, and what stands around every target does not."""
        special = {self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, self.tokenizer.bos_token_id}
        special |= set(self.around_targets)
        return str(self.tokenizer.decode([token for token in answer if token not in special])).strip()

    def answer(self, rows: Rows, max_new_tokens: int = 64, batch_size: int = 64) -> list[str]:
        """Answer inputs by greedy decoding.

        Args:
            rows (`dict[str, list]`): A slice with the input column; targets are not read.
            max_new_tokens (`int`, defaults to 64): Tokens of an answer at most; fewer where the model reads no more.
            batch_size (`int`, defaults to 64): Inputs decoded together.

        Returns:
            `list[str]`: One target text a row, sentinels included, without padding and end tokens.
        """
        inputs = Dataset.from_dict({self.columns[0]: rows[self.columns[0]]})
        return self.with_answers(inputs, max_new_tokens=max_new_tokens, batch_size=batch_size)[self.columns[1]][:]


def is_seq2seq(model: Any) -> bool:
    """Whether a model encodes an input and predicts labels with a decoder."""
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(encodes) and getattr(model, "can_generate", lambda: False)()


def _beyond(tokens: list[int], limit: int | None) -> bool:
    return limit is not None and len(tokens) > limit


def _cut(tokens: list[int], limit: int | None) -> list[int]:
    return tokens if limit is None or len(tokens) <= limit else [*tokens[: limit - 1], tokens[-1]]


def _texts(values: Iterable[Any]) -> Iterator[str]:
    """Yield the texts among a column's values."""
    return (value or "" for value in values if value is None or isinstance(value, str))


def _without_padding(labels: list[int]) -> list[int]:
    """Return labels without the -100 at their end, which pad them."""
    last = max((place for place, label in enumerate(labels) if label != IGNORED), default=-1)
    return labels[: last + 1]
