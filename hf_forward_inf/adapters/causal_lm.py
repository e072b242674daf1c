"""Decoder-only language models: Llama, Qwen, GPT-2, Gemma, Mistral and their kin."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Set
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, Value
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import Self

from hf_forward_inf.adapters.base import Batch, Forward, Rows
from hf_forward_inf.adapters.chat import Turns
from hf_forward_inf.adapters.columns import CHAT_PAIR, IGNORED, SPAN, each_row, read_rows
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
    sees_later_tokens,
    tokenizer_state,
)
from hf_forward_inf.adapters.naming import lone_question, pair_of
from hf_forward_inf.adapters.split_model import Blocks
from hf_forward_inf.adapters.text_rows import TextRows, cut, only_span
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import device_of, peft_parameters, uncompiled, virtual_tokens, without_peft


class CausalLMAdapter(LanguageAdapter):
    """Cross-entropy of the tokens that the model was taught to say: a completion's, the assistant's, or a text's.

    Rows have the columns that TRL's trainers take and become the tokens that TRL trains on: `prompt` and `completion`,
    as texts or as lists of messages; `messages`, with `tools` and `chat_template_kwargs` where there are such columns;
    `text`; or `input_ids`, with or without `labels`, taken as they are. Of `messages` all tokens of the assistant
    count, as with TRL's `assistant_only_loss`. Completions and texts end with the end-of-sequence token.
    `conversations`, and `instruction` or `question` with their answers, are read as messages; a warning says so.

    Queries without an answer (a `prompt` alone, `messages` that end with the user's) are answered by the model, and
    the tokens that it generated are what is traced ([`LanguageAdapter.with_answers`]).

    A row with a `span` (a part of its completion's text, in a column of that name) has the loss of that span's tokens
    alone: why did it say *Canberra*?

    A query with a `contrast` (or `rejected`: another completion, or another last answer) has the loss of its own minus
    that of the contrast ([`contrast.Contrast`]): why did it say *Sydney*, and not *Canberra*?

    A row beyond `max_length` loses the beginning of its prompt, then its end. Tokens are always padded on the right,
    whatever side the tokenizer pads for generation.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): A causal language model. Of a PEFT model the
            trained weights are perturbed, of others all, except those that the first half of the blocks reads: that
            half then runs once for all queries. `AscentConfig(modules=["all"])` or other names perturb them, too.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.
        text_column (`str`, defaults to `"text"`): Column of texts.
        prompt_column (`str`, defaults to `"prompt"`): Column of prompts.
        completion_column (`str`, defaults to `"completion"`): Column of completions.
        messages_column (`str`, defaults to `"messages"`): Column of conversations.
        turns (`str`, defaults to `"all"`): Of `messages`, count `"all"` turns of the assistant, or the `"last"` alone.
        max_length (`int`, *optional*): Tokens read of a row. Defaults to the limit that the model's configuration or
            the tokenizer states, if one does.

    Raises:
        TypeError: If the model is no causal language model.
    """

    default_strategy: Literal["full", "screen"] = "screen"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        text_column: str = "text",
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        messages_column: str = "messages",
        turns: Turns = "all",
        max_length: int | None = None,
    ):
        model = uncompiled(model)
        check_language_model(
            model, tokenizer, is_causal_lm(model), "predict the next token of a text", "AutoModelForCausalLM"
        )
        super().__init__(model, tokenizer)
        if turns not in ("all", "last"):
            raise ValueError(f"turns={turns!r} must be 'all' or 'last'.")
        check_tokenizer(model, tokenizer)
        self.columns: tuple[str, str] = (prompt_column, completion_column)
        self.rows = TextRows(tokenizer, (text_column, *self.columns, messages_column), turns)
        self.max_length = max_length or longest_input(without_peft(model).config, tokenizer)
        self.blocks = Blocks(model)
        self.shortens = "logits_to_keep" in inspect.signature(without_peft(model).forward).parameters
        self.causal: bool | None = None  # whether predictions depend on earlier tokens alone, once that was tried

    @property
    def cache_key(self) -> str:
        """Columns, turns, limits, the tokenizer's whole state and its chat template."""
        limits = (self.max_length, embeddings(self.model))
        return fingerprint(self.rows.names, self.rows.turns, limits, tokenizer_state(self.tokenizer))

    @property
    def config(self) -> dict[str, Any]:
        """Which of the assistant's turns count."""
        return {"turns": self.rows.turns}

    def prepare(self, rows: Dataset) -> Dataset:
        """Check that the model does not see the tokens that it is to predict.

        Raises:
            TypeError: If it does.
        """
        if self.causal is None:
            self.causal = not sees_later_tokens(self.model, self.tokenizer)
        if not self.causal:
            raise TypeError(
                f"{type(without_peft(self.model)).__name__} sees the tokens that it is to predict: its first logits "
                "change with the last token. Load a decoder with is_decoder=True, a masked language model with "
                "AutoModelForMaskedLM."
            )
        return super().prepare(rows)

    def columns_in(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the columns to read of rows that have columns of these names ([`TextRows.columns_in`])."""
        return self.rows.columns_in(names)

    def meant(self, features: Mapping[str, Any]) -> dict[str, str]:
        """Return the columns of another pair of names: as a chat's, where there is a template, or after a prompt."""
        pair = None if self.rows.knows(features, answered=True) else pair_of(features)
        if pair is None:
            return {}
        if pair[0] == self.columns[0]:
            return {pair[1]: self.columns[1]}
        chat = self.tokenizer.chat_template is not None
        return dict(zip(pair, self.names_of(True, True), strict=True)) if chat else {}

    def only_asked(self, names: Iterable[str]) -> str | None:
        """Return the column of questions, of queries without answers."""
        return None if self.rows.knows(names, answered=False) else lone_question(names)

    def doubt(self, queries: Dataset, candidates: Dataset) -> str | None:
        """Return a sentence where plain prompts are to be continued by a model that was trained on conversations."""
        known = self.rows.knows(queries.column_names, answered=False)
        if not known or not self.rows.knows(candidates.column_names, answered=True):
            return None
        read = self.rows.columns_in(queries.column_names, answered=False)
        plain = read[0] == self.columns[0] and isinstance(queries.features[read[0]], Value)
        if not plain or self.columns[1] in read or self.tokenizer.chat_template is None:
            return None
        if self.rows.is_plain(candidates):
            return None
        return (
            f"The queries' `{read[0]}` is continued as it is, and the candidates are conversations. To ask in a chat, "
            f"give `{self.rows.messages}`, or name the column `question`."
        )

    def names_of(self, inputs: bool, targets: bool) -> tuple[str, str]:
        """Return the columns of prompts and completions, or of both sides of a chat; of texts without prompts."""
        if not inputs:
            return self.columns[0], self.rows.text
        if targets and self.tokenizer.chat_template is not None:
            return CHAT_PAIR
        return self.columns

    def encode(self, rows: Rows) -> Rows:
        """Tokenize rows; labels are -100 where a token does not count, and a row's terms are those that do."""
        columns = self.columns_in(rows)
        if how := self.rows.how_read(columns):
            self.say_once(how)
        read = {name: rows[name] for name in columns}
        with self.rows.tokenized(each_row(read)):
            return read_rows(read, self._features, self.blank)

    def _features(self, row: dict[str, Any]) -> dict[str, Any]:
        return self._cut(*self._tokens(row))

    def _tokens(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Return a row's tokens and labels in full."""
        ids, labels = self.rows.tokens_and_labels(row)
        if row.get(SPAN):
            labels = only_span(row[SPAN], pieces(self.tokenizer, ids), labels)
        self.check_vocabulary([*ids, *(label for label in labels if label != IGNORED)])
        if self.tokenizer.bos_token_id is not None and ids[:2] == [self.tokenizer.bos_token_id] * 2:
            self.say_once(
                f"Rows begin with two {self.tokenizer.bos_token!r} tokens: their texts hold one, and the tokenizer "
                "adds one. Leave it out of the texts, unless the model was trained like this."
            )
        return ids, [IGNORED, *labels[1:]]  # nothing comes before the first token to predict it from

    def _cut(self, ids: list[int], labels: list[int]) -> dict[str, Any]:
        """Return them as features, as far as the model reads."""
        ids, labels, lost = cut(ids, labels, self.max_length)
        return {"input_ids": ids, "labels": labels, "terms": counted(labels), "truncated": lost}

    def questions(self, items: list[Any], candidates: Dataset | None) -> Rows:
        """Return texts and conversations as rows without answers.

        Texts are the user's turn of a chat where the tokenizer has a chat template, unless the candidates are plain
        texts too: then they are continued. A warning says which.
        """
        rows = self.rows.questions(items, candidates)
        if self.tokenizer.chat_template is not None and isinstance(items[0], str):
            plain = self.columns[0] in rows
            self.say_once(
                "The model continues the given texts as they are, since the candidates are plain texts. To ask in a "
                "chat, give conversations (lists of messages)."
                if plain
                else "The given texts are asked as the user's turn, since the tokenizer has a chat template. "
                f"To have them continued as they are, give rows with a `{self.columns[0]}`."
            )
        return rows

    def with_outputs(self, rows: Rows, outputs: list[Any]) -> Rows:
        """Return the rows with other completions: of messages another last turn of the assistant's, or another text.

        Raises:
            ValueError: If a row with another completion has a span.
        """
        if any(span and output is not None for span, output in zip(rows.get(SPAN) or [], outputs, strict=False)):
            raise ValueError(f"A query has either a `{SPAN}` or a contrast: take the `{SPAN}` out, or make it None.")
        others = [self.rows.with_output(row, output) for row, output in zip(each_row(rows), outputs, strict=True)]
        return {name: [row[name] for row in others] for name in others[0]}

    def asked(self, row: dict[str, Any]) -> list[int] | None:
        """Return the tokens of a prompt, or of a conversation that ends with the user's turn; `None` of other rows."""
        return self.rows.asked_tokens(row)

    def completed(self, row: dict[str, Any], asked: list[int] | None, answer: list[int] | None) -> dict[str, Any]:
        """Return the columns that hold a row's answer: its tokens, and its text as completion or assistant's turn."""
        return self.rows.completed(row, asked, answer)

    def limit_of_answer(self, asked: list[int]) -> int | None:
        """Return how many tokens fit behind a prompt."""
        return None if self.max_length is None else self.max_length - len(asked)

    def answer(self, rows: Rows, max_new_tokens: int = 64, batch_size: int = 32) -> list[str]:
        """Complete prompts by greedy decoding.

        Args:
            rows (`dict[str, list]`): With the prompt column, or messages that end with the user's.
            max_new_tokens (`int`, defaults to 64): Tokens of an answer at most; fewer where the model reads no more.
            batch_size (`int`, defaults to 32): Prompts completed together.

        Returns:
            `list[str]`: One completion a row, without special tokens.
        """
        asked = self.rows.without_answers(rows)
        found = self.with_answers(Dataset.from_dict(asked), max_new_tokens=max_new_tokens, batch_size=batch_size)
        return [self.rows.answer_in(row) or "" for row in found.to_list()]

    def lengths(self, features: Rows | Dataset) -> np.ndarray:
        """Return the number of tokens of each row, `[rows, 1]`."""
        return np.array([[len(ids)] for ids in features["input_ids"]])

    def collate(self, features: Rows) -> Batch:
        """Pad on the right; labels are -100 where nothing counts."""
        ids = features["input_ids"]
        return {
            "input_ids": pad(ids, self.padding),
            "attention_mask": pad([[1] * len(row) for row in ids], 0),
            "labels": pad(features["labels"], IGNORED),
        }

    def term_losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Return the cross-entropy of every token of `input_ids`, `[rows, tokens]`, 0 where it doesn't count."""
        logits, labels = self._logits(forward, batch)
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        losses = losses.view_as(labels)
        return F.pad(losses, (batch["labels"].shape[1] - labels.shape[1], 0))

    def _logits(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits from the first position that predicts a token that counts, and the tokens predicted."""
        labels, options = batch["labels"], {}
        first = max(1, int((labels != IGNORED).any(0).int().argmax()))
        virtual = virtual_tokens(self.model)
        if self.shortens:  # the output layer is expensive, and prompts need none of it
            positions = torch.arange(first - 1, labels.shape[1] - 1, device=labels.device)
            options["logits_to_keep"] = positions + virtual
        read = {key: value for key, value in batch.items() if key not in ("labels", "states")}
        with self.blocks.run_second_half(batch.get("states")):
            logits = forward(**read, use_cache=False, **options).logits
        return logits if self.shortens else logits[:, virtual + first - 1 : -1], labels[:, first:]

    def outputs_and_loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the logits of the tokens that count, `[tokens, vocabulary]`, and their cross-entropy."""
        logits, labels = self._logits(forward, batch)
        valid = labels != IGNORED
        return logits[valid].float(), partial(F.cross_entropy, target=labels[valid], reduction="sum")

    def term_texts(self, features: Rows) -> list[list[str]]:
        """Return the text of every token."""
        return [pieces(self.tokenizer, ids) for ids in features["input_ids"]]

    def representation(self, batch: Batch) -> Tensor:
        """Return the mean of the hidden states from which tokens that count are predicted, `[rows, hidden]`."""
        return self.loss_and_representation(batch)[1]

    @torch.no_grad()
    def loss_and_representation(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return losses and representations of one run."""
        with inputs_of(self.model.get_output_embeddings()) as read:
            losses = self.loss(self.model, batch)
        states = read[-1].float()
        states = states[:, virtual_tokens(self.model) * (not self.shortens) :]
        # Where the output layer reads the last hidden states only, they belong to the last labels.
        valid = (batch["labels"] != IGNORED)[:, -states.shape[1] :]
        predicting = F.pad(valid[:, 1:], (0, 1)) if states.shape[1] == batch["labels"].shape[1] else valid
        return losses, (states * predicting[..., None]).sum(1) / predicting.sum(1, keepdim=True)

    def with_model(self, model: nn.Module) -> Self:
        """Return the same adapter for another model of the same architecture."""
        other = super().with_model(model)
        other.blocks, other.causal = Blocks(other.model), None
        return other

    def default_modules(self) -> list[str]:
        """Return, of a PEFT model, what it has trained, else everything."""
        return peft_parameters(self.model) or ["all"]

    def shared_parameters(self) -> Set[str]:
        """Return the parameters of the embeddings and the first half of the blocks: unperturbed, they run once."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=device_of(self.model))
        self.blocks.explore(lambda: self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False))
        return self.blocks.before_middle

    def run_shared(self, batch: Batch) -> Batch:
        """Run the first half of the blocks, where there are two halves."""
        if not self.shared_parameters():
            return batch
        read = {key: value for key, value in batch.items() if key != "labels"}
        return {**batch, "states": self.blocks.run_first_half(lambda: self.model(**read, use_cache=False))}

    def shared_lengths(self, lengths: np.ndarray) -> np.ndarray | None:
        """Return the tokens of each row and the positions of a trained prompt before them."""
        return lengths[:, 0] + virtual_tokens(self.model) if self.shared_parameters() else None

    def shared_states(self, batch: Batch) -> Tensor:
        """Return what the second half of the blocks reads."""
        return batch["states"]

    def with_states(self, batch: Batch, states: Tensor) -> Batch:
        """Return the batch with what the second half of the blocks reads."""
        return {**batch, "states": states}


def is_causal_lm(model: Any) -> bool:
    """Whether a model predicts the next token of a text."""
    base = without_peft(model)
    config = getattr(base, "config", None)
    generates = getattr(base, "can_generate", lambda: False)()
    return bool(generates) and config is not None and not getattr(config, "is_encoder_decoder", False)
