"""What the adapters of language models share: tokens, padding, limits, queries that the model answers."""

import copy
import json
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_forward_inf.adapters.base import Adapter, Rows
from hf_forward_inf.adapters.columns import IGNORED, UnreadableRow, asked_items, each_row
from hf_forward_inf.adapters.generation import generate
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.memory import once
from hf_forward_inf.utils.models import device_of, evaluating, is_quantised, peft_parameters
from hf_forward_inf.utils.validation import listed

CONTRASTS = ("contrast", "rejected")
"""Columns in which a query may hold what should have been said."""
FEW = 0.8
"""Share of a model's embeddings that its tokenizer has tokens for, at least; they are padded by a few percent."""
LARGE = 10**9
"""Number of a model's parameters beyond which copies of them are expensive."""


class LanguageAdapter(Adapter):
    """What language models of both kinds have in common.

    Args:
        model (`torch.nn.Module`): The model.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.
    """

    answers_queries = True
    contrast_columns = CONTRASTS
    poor_modes: ClassVar[Mapping[str, str]] = {
        "descent": "loses .134 of a linear datamodeling score of .789",
        "symmetric": "takes twice the passes and loses .149 of a linear datamodeling score of .747 where scores have "
        "no floor; with one (strategy='auto') it gains .015",
    }
    decodes: ClassVar[bool] = False
    """Whether a decoder of its own answers, or the answer follows the question."""
    blank: ClassVar[dict[str, Any]] = {"input_ids": [], "labels": [], "terms": 0, "truncated": ""}
    """Features of a row that can't be read."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model)
        self.tokenizer = tokenizer
        self._said: set[str] = set()

    def prepare(self, rows: Dataset) -> Dataset:
        """Return rows as Python values, whatever format was set for others."""
        return rows.with_format(None)

    @property
    def default_falls(self) -> float:  # type: ignore[override]
        """A quarter for PEFT models ([`preferred_ascent`])."""
        return 0.25 if peft_parameters(self.model) else 1.0

    def default_ascent(self, direction: str | None = None) -> dict[str, Any]:
        """Corrected by curvature ([`preferred_ascent`])."""
        return preferred_ascent(direction, bool(peft_parameters(self.model)))

    def rows_for(self, inputs: Any, candidates: Dataset | None = None) -> Rows:
        """Return what a user asks as rows.

        Args:
            inputs: A text, a conversation (a list of messages), a row (a dictionary), or a list of one of these.
            candidates (`datasets.Dataset`, *optional*): What they are traced over.

        Raises:
            TypeError: If they are something else, or of several kinds.
        """
        items = asked_items(inputs)
        if items and isinstance(items[0], Mapping):
            return {name: [item[name] for item in items] for name in items[0]}
        return self.questions(items, candidates)

    @abstractmethod
    def questions(self, items: list[Any], candidates: Dataset | None) -> Rows:
        """Return texts and conversations as rows without answers."""

    @abstractmethod
    def asked(self, row: dict[str, Any]) -> list[int] | None:
        """Return the tokens of what a row asks, `None` where it has its answer."""

    @abstractmethod
    def completed(self, row: dict[str, Any], asked: list[int] | None, answer: list[int] | None) -> dict[str, Any]:
        """Return the columns that hold a row's answer, given as tokens; with `None`, those of a row that has one."""

    @abstractmethod
    def limit_of_answer(self, asked: list[int]) -> int | None:
        """Return how many tokens the model can generate for a question, `None` where nothing limits it."""

    @property
    def generation_options(self) -> dict[str, Any]:
        """What generation needs besides the tokens."""
        return {}

    @property
    def padding(self) -> int:
        """The token that pads; it is masked, so any will do where tokenizer or model have none for it."""
        padding = self.tokenizer.pad_token_id
        known = padding is not None and padding < embeddings(self.model)
        return padding if known else self.tokenizer.eos_token_id or 0

    def with_answers(
        self, queries: Dataset, max_new_tokens: int = 64, batch_size: int = 32, **options: Any
    ) -> Dataset:
        """Answer, by greedy decoding, the queries that have no answer.

        What it generates is what is traced, token by token: it is in the column `output_ids`, with an end token only
        where the model generated one. The answer's text is for people.

        Args:
            queries (`datasets.Dataset`): Queries, with or without answers.
            max_new_tokens (`int`, defaults to 64): Tokens of an answer at most; fewer where the model reads no more.
            batch_size (`int`, defaults to 32): Queries answered together.
            **options: Of the model's `generate`, such as `do_sample`.

        Returns:
            `datasets.Dataset`: The queries, all of them with answers.

        Raises:
            ValueError: If a query can't be read, or leaves no room for an answer.
        """
        rows = each_row(queries.with_format(None)[:])
        asked = self._each_asked(rows)
        open_rows = [row for row, ids in enumerate(asked) if ids is not None]
        if not open_rows:
            return queries
        questions = [ids for ids in asked if ids is not None]
        limits = [self.limit_of_answer(ids) for ids in questions]
        full = [row for row, limit in zip(open_rows, limits, strict=True) if limit is not None and limit < 1]
        if full:
            raise ValueError(
                f"No room for an answer in queries {listed(np.array(full))}: they fill all that the model reads."
            )
        room = [max_new_tokens if limit is None else min(max_new_tokens, limit) for limit in limits]
        answers = self.generated(questions, room, batch_size, **options)
        found = dict(zip(open_rows, answers, strict=True))
        made = [self.completed(row, asked[i], found.get(i)) for i, row in enumerate(rows)]
        for name in made[0]:  # the tokens first: a dataset without columns has no rows
            if name in queries.column_names:
                queries = queries.remove_columns(name)
            queries = queries.add_column(name, [columns[name] for columns in made])
        return queries

    def generated(
        self, questions: Sequence[list[int]], room: Sequence[int], batch_size: int = 32, **options: Any
    ) -> list[list[int]]:
        """Return the model's answers to questions, both as tokens, of at most `room` tokens each; see [`generate`]."""
        return generate(
            self.model, questions, room=room, padding=self.padding, batch_size=batch_size, decoder=self.decodes,
            **{**self.generation_options, **options},
        )  # fmt: skip

    def _each_asked(self, rows: list[dict[str, Any]]) -> list[list[int] | None]:
        asked = []
        for number, row in enumerate(rows):
            try:
                asked.append(self.asked(row))
            except UnreadableRow as reason:
                raise ValueError(f"Queries row {number} can't be answered: {reason}.") from reason
        return asked

    def check_vocabulary(self, ids: Sequence[int]) -> None:
        """Refuse tokens that the model has no embedding for."""
        size = embeddings(self.model)
        if not ids or (min(ids) >= 0 and max(ids) < size):
            return
        beyond = next((token for token in ids if not 0 <= token < size), None)
        if beyond is not None:
            raise UnreadableRow(
                f"token {self.tokenizer.convert_ids_to_tokens(beyond)!r} has the id {beyond} and the model {size} "
                "embeddings: give the tokenizer that the model was trained with, or resize_token_embeddings"
            )

    def say_once(self, text: str) -> None:
        """Warn, once for each adapter and text."""
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=3)


def with_template(processor: Any) -> PreTrainedTokenizerBase:
    """Return a processor's tokenizer with the processor's chat template, where that has one of its own."""
    tokenizer = copy.copy(processor.tokenizer)
    tokenizer.chat_template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    return tokenizer


def embeddings(model: Any) -> int:
    """Return how many tokens a model has embeddings for."""
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])


def counted(labels: list[int]) -> int:
    """Count the terms of a row's loss."""
    return sum(label != IGNORED for label in labels)


def check_language_model(model: nn.Module, tokenizer: Any, fits: bool, does: str, loader: str) -> None:
    """Refuse a model of another kind, or one without its tokenizer: raise a `TypeError`.

    Args:
        model (`torch.nn.Module`): The model.
        tokenizer: Its tokenizer, `None` where there is none.
        fits (`bool`): Whether the model is of the adapter's kind.
        does (`str`): What such a model does.
        loader (`str`): What loads one.
    """
    if not fits:
        raise TypeError(
            f"{type(model).__name__} does not {does}. Load it with {loader}, or pass ForwardInf an adapter of your "
            "own."
        )
    if tokenizer is None:
        raise TypeError(f"{type(model).__name__} needs its tokenizer: ForwardInf(model, tokenizer).")
    if hasattr(tokenizer, "tokenizer") and not hasattr(tokenizer, "eos_token_id"):
        raise TypeError(
            f"{type(tokenizer).__name__} is no tokenizer, nor a processor of texts and images: give its `tokenizer`, "
            "if the rows are texts alone."
        )


def check_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that can't be the model's own, and warn of one that is hardly: its losses would mean nothing.

    It can't be where the model has no embeddings for tokens of its vocabulary, or for those that begin and end every
    text. Tokens that were added to a vocabulary, such as one that pads, may be without: they are looked for by row.

    Args:
        model (`torch.nn.Module`): A language model.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.

    Raises:
        ValueError: If it is another model's tokenizer.
    """
    known, size = len(tokenizer), embeddings(model)
    counts = f"It has {known:,} tokens and the model {size:,} embeddings"
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if tokenizer.vocab_size > size or any(token is not None and token >= size for token in ends):
        raise ValueError(
            f"This is not {type(model).__name__}'s own tokenizer. {counts}: give the one that the model was trained "
            "with, or call model.resize_token_embeddings and train it."
        )
    config = model.config.get_text_config(decoder=True)
    named = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    pairs = [(ids if isinstance(ids, list) else [ids], getattr(tokenizer, name)) for name, ids in named.items()]
    special = [own in ids for ids, own in pairs if own is not None and ids[0] is not None]
    if known < FEW * size or (len(special) > 1 and not any(special)):
        other = ", and its special tokens have other ids" if special and not any(special) else ""
        warnings.warn(
            f"Is this {type(model).__name__}'s own tokenizer? {counts}{other}. Losses of another tokenizer's tokens "
            "mean nothing.",
            stacklevel=4,
        )


def pad(sequences: list[list[int]], value: int) -> Tensor:
    """Pad on the right to a common length, `[rows, longest]`."""
    counts = np.array([len(sequence) for sequence in sequences])
    padded = np.full((len(counts), counts.max(initial=0)), value)
    padded[np.arange(padded.shape[1]) < counts[:, None]] = np.fromiter(chain.from_iterable(sequences), dtype=np.int64)
    return torch.from_numpy(padded)


def longest_input(config: Any, tokenizer: PreTrainedTokenizerBase, part: str = "decoder") -> int | None:
    """Return how many tokens a model reads by its configuration and tokenizer; `None` where neither states a limit.

    Args:
        config (`transformers.PreTrainedConfig`): The model's.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.
        part (`str`, defaults to `"decoder"`): The `"encoder"` or the `"decoder"`.
    """
    config = config.get_text_config(**{part: True})  # of models that read more than texts, the language model's
    names = ("max_position_embeddings", f"max_{part}_position_embeddings", "max_seq_len")
    stated = [getattr(config, name, None) for name in names]
    limits = [limit for limit in (*stated, tokenizer.model_max_length) if limit and 0 < limit < 10**6]
    return min(limits, default=None)


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that tokens depend on: part of the cache key.

    Padding and truncation are left out: they are settings of the tokenizer's last call.
    """
    return once("tokenizer", tokenizer, lambda: _tokenizer_state(tokenizer))


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) | {"padding": None, "truncation": None} if backend is not None else None
    vocabulary = json.dumps(state or tokenizer.get_vocab())
    special = json.dumps(tokenizer.special_tokens_map, default=str)
    return fingerprint(vocabulary, special, tokenizer.chat_template)


def preferred_ascent(direction: str | None = None, peft: bool = False) -> dict[str, Any]:
    """Return K-FAC, fitted once on a small sample: queries cost no more than along the gradient and find more.

    One step of length 1 at damping .01, chosen on two models trained again without halves of their data (LDS of 80
    queries each, 60 halves x 2 seeds) and three sets of facts to be found (MRR):

    | | facts, mT5 | sentences, Llama | built-in facts |
    | --- | --- | --- | --- |
    | damping .01, length 1 | .638 | .748 | .965 |
    | damping .1, length 2, the default before | .542 | .673 | .963 |
    | damping .01, a divergence of .01 nats for every query (`trust`) | .628 | .729 | .914 |
    | damping .003, three steps to that divergence | .584 | .720 | .954 |
    | damping .003, three steps of 1/3 | .602 | .731 | .953 |

    A divergence fails where the model knows its sentences by heart: predictions of others hardly move, and such
    queries get steps of 5 and more.

    A LoRA asks for less damping, .003. With one of rank 16, trained on 600 sentences, and 60 halves as the truth, the
    LDS of 80 queries is .643, at damping .01 .636, at .1 .604, at 1 .551, after three times the length .492, along the
    gradient .422. What loses LDS finds more of the rows that plant a backdoor together. So do scores in which tokens
    whose losses fall count less: where they count a quarter, the LDS is that of damping .01 again, on another LoRA,
    too, and the auPRC of the planted rows .888 instead of .846 (docs/results/detection.md).

    It is the direction at any size, and for quantised weights: its steps are of low rank, and its factors take a
    quarter of the model's memory ([`AscentConfig`]).
    """
    direction = direction or "kfac"
    if direction != "kfac":
        return {"direction": direction}
    return {"direction": direction, "radius": 1.0, "damping": 0.003 if peft else 0.01, "sample": 128}


def can_be_copied(model: nn.Module) -> bool:
    """Return whether steps may change whole weights: none is quantised, and there are at most [`LARGE`]."""
    return sum(p.numel() for p in model.parameters()) <= LARGE and not is_quantised(model)


@torch.no_grad()
def sees_later_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a model's prediction at a position changes with a later token, as a masked language model's does.

    Args:
        model (`torch.nn.Module`): Returns logits.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.
    """
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(len(tokenizer)) if i not in special][:8]
    if len(ids) < 3:
        return False
    rows = torch.tensor([ids[:-1], [*ids[:-2], ids[-1]], ids[:-1]], device=device_of(model))
    with evaluating(model):
        logits = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits[:, :-1].float()
    changed, noise = ((logits[0] - other).abs().max().item() for other in logits[1:])
    return changed > 10 * noise + 1e-4 * logits.abs().max().item()


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module reads within a `with`; transformers' `output_hidden_states` would leave hooks behind."""
    read: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    try:
        yield read
    finally:
        handle.remove()


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return the text of each token, cut from the whole text: a token's text depends on the ones before it."""
    ends = [len(tokenizer.decode(ids[:end])) for end in range(len(ids) + 1)]
    text = str(tokenizer.decode(ids))
    return [text[a:b] for a, b in pairwise(ends)]
