"""A callback for trainers: what the model still gets wrong at the end of training, and the rows that taught it so."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback

from hf_forward_inf.adapters import Adapter
from hf_forward_inf.adapters.classification import ClassifierAdapter
from hf_forward_inf.adapters.columns import IGNORED, INPUT_IDS, LABELS
from hf_forward_inf.adapters.language import LanguageAdapter
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.commands.answers import answers, show
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.passes.encoding import encode
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.scores.metrics import best_first
from hf_forward_inf.tracing.trained import rows_of
from hf_forward_inf.utils.models import evaluating
from hf_forward_inf.utils.processes import process_state, say
from hf_forward_inf.utils.rows import text_columns

TEXT = "text"
EXPECTED = "expected"
"""Column of failures with what should have been said."""


class TraceFailures(TrainerCallback):
    """Traces the evaluation's failures to the training rows, at the end of training.

    A language model fails on a row whose target it does not generate: its own answer is traced. A classifier fails on
    a row to which it gives another label: that label is traced. Candidates are the trainer's own rows. The result is
    printed, and written to `output`: `report.html` and `attribution/`. An error here ends no training: it is a
    warning.

    Args:
        trainer (`transformers.Trainer`): The trainer, with an `eval_dataset`; TRL's `SFTTrainer` too.
        output (`str`, defaults to `"outputs/failures"`): Folder for the result.
        num_queries (`int`, defaults to 20): Failures that are traced at most: those with the highest losses.
        top_k (`int`, defaults to 20): Training rows of each that are kept.
        max_new_tokens (`int`, defaults to 64): Tokens of a generated answer at most.
        **options: Options of [`ForwardInf`].

    Example:
        >>> trainer.add_callback(TraceFailures(trainer))
        >>> trainer.train()
    """

    def __init__(
        self,
        trainer: Any,
        output: str | Path = "outputs/failures",
        *,
        num_queries: int = 20,
        top_k: int = 20,
        max_new_tokens: int = 64,
        **options: Any,
    ):
        self.trainer, self.output = trainer, Path(output)
        self.num_queries, self.top_k, self.max_new_tokens = num_queries, top_k, max_new_tokens
        self.options = options
        self.found: Attribution | None = None
        """The result, once there is one."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trace."""
        try:
            self.found = self.trace()
        except Exception as error:  # the trained model is not saved yet
            warnings.warn(f"The evaluation's failures are not traced: {error}", stacklevel=2)

    def trace(self) -> Attribution | None:
        """Trace the failures of the model as it is now, and write and print the result; `None` if there are none.

        Raises:
            TypeError: As [`ForwardInf.from_trainer`].
            ValueError: As [`ForwardInf.from_trainer`], or if the trainer has no `eval_dataset`.
        """
        if self.trainer.eval_dataset is None:
            raise ValueError("the trainer has no eval_dataset.")
        tracer = ForwardInf.from_trainer(self.trainer, **self.options)
        rows = rows_of(self.trainer, tracer.adapter, "eval")
        failed = failures(tracer.adapter, rows, self.num_queries, self.max_new_tokens)
        if failed is None:
            say(f"None of the {len(rows)} rows of the evaluation fails: there is nothing to trace.")
            return None
        found = readable(tracer.trace(failed, top_k=self.top_k).compact(), tracer.adapter)
        page = self.output / "report.html"
        if process_state().is_main_process:
            found.save_to_disk(self.output / "attribution")
            found.to_html(page, title="Which training rows are behind what the model gets wrong?")
        show(answers(found), str(page))
        return found


def failures(adapter: Adapter, rows: Dataset, count: int, max_new_tokens: int = 64) -> Dataset | None:
    """Return what the model gets wrong as queries: its own answers, and what was expected in a column `expected`.

    Args:
        adapter (`Adapter`): Knows the model.
        rows (`datasets.Dataset`): Rows with what is expected.
        count (`int`): Failures returned at most: those with the highest losses, by term.
        max_new_tokens (`int`, defaults to 64): Tokens of a generated answer at most.

    Returns:
        `datasets.Dataset`: Highest loss first; `None` if the model gets all right.
    """
    with evaluating(adapter.model):
        loss = LossPass(adapter, rows)
        order = best_first(loss.base() / loss.terms)
    ranked = rows.select(order)
    if isinstance(adapter, LanguageAdapter):
        failed = _wrong_answers(adapter, ranked, max_new_tokens)
    elif isinstance(adapter, ClassifierAdapter):
        failed = _wrong_labels(adapter, ranked)
    else:
        failed = ranked
    return failed.select(range(min(count, len(failed)))) if len(failed) else None


def _wrong_answers(adapter: LanguageAdapter, rows: Dataset, max_new_tokens: int) -> Dataset:
    """Return the model's answers that are not the rows' own, as tokens that are traced and texts for people.

    Rows that answer nothing, such as plain texts, are returned as they are.
    """
    encoded = encode(adapter, rows, "queries")
    asked, expected = [], []
    for ids, labels in zip(encoded[INPUT_IDS][:], encoded[LABELS][:], strict=True):
        first = next(place for place, label in enumerate(labels) if label != IGNORED)
        asked.append(ids if adapter.decodes else ids[:first])
        expected.append([label for label in labels if label != IGNORED])
    if any(len(ids) < 2 for ids in asked):
        return rows
    limits = [adapter.limit_of_answer(ids) for ids in asked]
    said = adapter.generated(asked, [min(max_new_tokens, max(1, limit or max_new_tokens)) for limit in limits])
    queries = []
    for question, answer, right in zip(asked, said, expected, strict=True):
        own, other = _text(adapter, answer), _text(adapter, right)
        if answer and own != other:
            texts = {adapter.columns[0]: _text(adapter, question), adapter.columns[1]: own, EXPECTED: other}
            queries.append({**_tokens(adapter, question, answer), **texts})
    return Dataset.from_list(queries)


def _tokens(adapter: LanguageAdapter, question: list[int], answer: list[int]) -> dict[str, list[int]]:
    """Return a question and its answer as the columns of tokens that are traced."""
    if adapter.decodes:
        return {INPUT_IDS: question, LABELS: answer}
    return {INPUT_IDS: [*question, *answer], LABELS: [*[IGNORED] * len(question), *answer]}


def _text(adapter: LanguageAdapter, ids: list[int]) -> str:
    return str(adapter.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _wrong_labels(adapter: ClassifierAdapter, rows: Dataset) -> Dataset:
    """Return rows with the model's label in the place of another."""
    column = adapter.columns_in(rows.column_names)[-1]
    prepared = adapter.prepare(rows)
    given = prepared[column][:]
    said = adapter.answer(prepared[:])
    wrong = np.flatnonzero([own != other for own, other in zip(said, given, strict=True)])
    feature = prepared.features[column]
    failed = rows.select(wrong).remove_columns(column)
    failed = failed.add_column(column, [said[i] for i in wrong], feature=feature)
    return failed.add_column(EXPECTED, [given[i] for i in wrong], feature=feature)


def readable(found: Attribution, adapter: Adapter) -> Attribution:
    """Return an attribution whose candidates have texts where they have only tokens."""
    rows = found.candidates
    tokenizer = getattr(adapter, "tokenizer", None)
    if tokenizer is None or INPUT_IDS not in rows.column_names or text_columns(rows.column_names):
        return found
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in rows[INPUT_IDS][:]]
    return replace(found, candidates=rows.add_column(TEXT, texts))
