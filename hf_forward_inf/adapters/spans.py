"""The part of an answer that fine-tuning has taught: the tokens that the model before it gave less chance."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_forward_inf.adapters.base import Rows
from hf_forward_inf.adapters.causal_lm import CausalLMAdapter
from hf_forward_inf.adapters.columns import IGNORED, SPAN
from hf_forward_inf.utils.models import check_same_parameters, evaluating, peft_parameters, to_device

LEAST = 1.0
"""Nats by which a token's loss must have fallen to count as learned."""


def learned_spans(
    adapter: CausalLMAdapter, queries: Dataset, base_model: nn.Module | None = None, least: float = LEAST
) -> Dataset:
    """Return queries with a `span`: the part of each answer that fine-tuning has taught.

    The span is the run of tokens whose losses fine-tuning has lowered most, each by more than `least` on the whole: a
    word that a backdoor says, an object that was changed. The form of an answer, which both models guess alike, is
    outside of it, and so no longer outweighs what is asked about. Where nothing was learned the span is `None`, and
    the whole answer is traced.

    Args:
        adapter (`CausalLMAdapter`): Knows the fine-tuned model.
        queries (`datasets.Dataset`): Queries; those without an answer are answered by the model.
        base_model (`torch.nn.Module`, *optional*): The model before fine-tuning. Defaults to a PEFT model's own base.
        least (`float`, defaults to 1.0): Nats by which the loss of a token must have fallen.

    Raises:
        ValueError: If queries have spans already, can't be read, or there is no base model.
    """
    if SPAN in queries.column_names:
        raise ValueError(f"The queries have a `{SPAN}` already: remove that column to have spans found.")
    if base_model is not None:
        check_same_parameters(adapter.model, base_model)
    elif not peft_parameters(adapter.model):
        raise ValueError("Only a PEFT model holds the model before fine-tuning: give it as base_model=.")
    queries = adapter.with_answers(adapter.prepare(queries))
    features = adapter.encode(queries[:])
    if 0 in features["terms"]:
        raise ValueError(f"Query {features['terms'].index(0)} can't be read, or has no tokens that count.")
    spans = [_span(adapter, one, base_model, least) for one in _rows(features)]
    return queries.add_column(SPAN, spans)


def _rows(features: Rows) -> list[Rows]:
    return [{name: [values[i]] for name, values in features.items()} for i in range(len(features["terms"]))]


@torch.no_grad()
def _span(adapter: CausalLMAdapter, one: Rows, base_model: nn.Module | None, least: float) -> str | None:
    """Return the text of one encoded query's span."""
    batch = to_device(adapter.collate(one), adapter.model)
    other: Any = base_model or adapter.model
    without: AbstractContextManager[Any] = nullcontext() if base_model is not None else adapter.model.disable_adapter()
    with evaluating(adapter.model, other):
        after: Tensor = adapter.term_losses(adapter.model, batch)[0]
        with without:
            before: Tensor = adapter.term_losses(other, batch)[0].to(after.device)
    counts = np.array(one["labels"][0]) != IGNORED
    gains = np.where(counts, (before - after).cpu().numpy()[: len(counts)] - least, -np.inf)
    run = greatest_run(gains)
    return None if run is None else _text(adapter.term_texts(one)[0], run, counts)


def greatest_run(values: Sequence[float] | np.ndarray) -> tuple[int, int] | None:
    """Return begin and end of the run with the greatest sum; `None` if no value is positive."""
    best, found, begin, total = 0.0, None, 0, 0.0
    for i, value in enumerate(values):
        if total <= 0:
            begin, total = i, 0.0
        total += value
        if total > best:
            best, found = total, (begin, i + 1)
    return found


def _text(texts: Sequence[str], run: tuple[int, int], counts: np.ndarray) -> str:
    """Return the run's text, with tokens before it where an earlier part of the answer reads the same."""
    (begin, end), ends = run, [0, *accumulate(len(text) for text in texts)]
    whole = "".join(texts)
    answer = ends[int(counts.argmax())]
    while begin > 0 and counts[begin - 1] and whole.find("".join(texts[begin:end]), answer) < ends[begin]:
        begin -= 1
    return "".join(texts[begin:end])
