"""What a run traces: a model, queries that it answers, candidates, and the truth where it is known."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_forward_inf.commands.options import TraceOptions
from hf_forward_inf.data import builtin_facts, load_rows, proponents
from hf_forward_inf.evaluation.candidate_sets import candidate_pool, own_candidates
from hf_forward_inf.evaluation.task import MAIN, Task, has_facts
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.toys.tiny_models import tiny_mt5
from hf_forward_inf.utils.processes import process_state, say
from hf_forward_inf.utils.rows import sample_rows

BUILTIN_CANDIDATES = 1200
"""Candidates traced of the built-in facts, unless the user says how many."""


TRAINED_QUERIES = 4
"""Queries asked of a model that is yet to be trained, for each one wanted: it will not answer them all."""


@dataclass
class Source:
    """What tasks are drawn from: a model, all queries with proponents, and all sentences.

    Args:
        model (`torch.nn.Module`): The model, on its device.
        tokenizer: Its tokenizer.
        queries (`datasets.Dataset`): With a column `answered` where it is known whether the model answers them.
        abstracts (`datasets.Dataset`): The training sentences.
        num_candidates (`int`, *optional*): Candidates of a task; all if unset.
        figures (`dict[str, float]`): `answered`, the share of queries that the model answers exactly.
    """

    model: Any
    tokenizer: Any
    queries: Dataset
    abstracts: Dataset
    num_candidates: int | None
    figures: dict[str, float]

    def draw(self, options: TraceOptions, seed: int) -> Task:
        """Draw queries, and candidates for them."""
        queries, groups = self._draw_queries(options, seed)
        own = None
        if options.own_candidates:
            candidates, own = own_candidates(queries, self.abstracts, seed=seed)
            say(f"Candidates: {np.mean([len(rows) for rows in own]):.0f} a query, {len(candidates):,} in all.")
        else:
            candidates = draw_candidates(queries, self.abstracts, self.num_candidates, seed)
        if options.paraphrased:
            others, originals = paraphrases(queries, seed)
            groups["paraphrased"] = list(range(len(queries), len(queries) + len(others)))
            queries = concatenate_datasets([queries, others])
            own = None if own is None else own + [own[i] for i in originals]
        truth = None
        if has_facts(queries, candidates):
            truth = proponents(queries, candidates, options.strict)
        if own is not None and truth is not None:  # of equal sentences a set holds one
            truth = [[row for row in rows if row in set(mine)] for rows, mine in zip(truth, own, strict=True)]
        return Task(queries, candidates, truth, groups, own)

    def _draw_queries(self, options: TraceOptions, seed: int) -> tuple[Dataset, dict[str, list[int]]]:
        if "answered" not in self.queries.column_names:
            queries = sample_rows(self.queries, options.num_queries, seed)
            return queries, {MAIN: list(range(len(queries)))}
        known = np.array(self.queries["answered"], dtype=bool)
        kinds = [self.queries.select(np.flatnonzero(known == kind)) for kind in (True, False)]
        right, wrong = (sample_rows(rows, options.num_queries, seed) for rows in kinds)
        if not options.unanswered:
            return right, {MAIN: list(range(len(right)))}
        queries = concatenate_datasets([right, wrong])
        groups = {MAIN: list(range(len(queries)))}
        if len(right) and len(wrong):
            groups["answered"] = list(range(len(right)))
            groups["unanswered"] = list(range(len(right), len(queries)))
        return queries, groups


def load_source(options: TraceOptions, seed: int) -> Source:
    """Load or train the model, and find the queries that may be asked of it.

    Raises:
        ValueError: If no query has a proponent, or the model answers none of them.
    """
    if options.model:
        return _source_of_model(options)
    return _source_of_trained_model(options, seed) if options.train else _builtin_source(options)


def _source_of_model(options: TraceOptions) -> Source:
    abstracts, queries = load_rows(str(options.candidates), "abstracts"), load_rows(str(options.queries), "queries")
    say(f"Tracing {options.queries} over {options.candidates} with {options.model}.")
    model, tokenizer = load_model(str(options.model))
    return _source(model, tokenizer, queries, abstracts, options.num_candidates, options)


def load_model(name: str) -> tuple[Any, Any]:
    """Load a language model of either kind, on this process's device, and its tokenizer: hub name or local folder."""
    config = AutoConfig.from_pretrained(name)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(name).to(process_state().device).eval(), AutoTokenizer.from_pretrained(name)


def _builtin_source(options: TraceOptions) -> Source:
    say("Tracing the built-in facts with a tiny mT5 trained on them; --model, --candidates, --queries for yours.")
    corpus = builtin_facts()
    model, tokenizer = tiny_mt5(corpus["abstracts"], epochs=options.epochs)
    count = options.num_candidates or BUILTIN_CANDIDATES
    return _source(model, tokenizer, corpus["queries"], corpus["abstracts"], count, options)


def _source_of_trained_model(options: TraceOptions, seed: int) -> Source:
    """Draw the candidates first: the model is trained on them, and on them alone."""
    abstracts, queries = load_rows(str(options.candidates), "abstracts"), load_rows(str(options.queries), "queries")
    say(f"Tracing {options.queries} over {options.candidates} with a tiny mT5 trained on the candidates.")
    queries = with_proponents(queries, abstracts, options.strict)
    queries = sample_rows(queries, TRAINED_QUERIES * options.num_queries, seed)
    candidates = draw_candidates(queries, abstracts, options.num_candidates, seed)
    model, tokenizer = tiny_mt5(candidates, epochs=options.epochs)
    return _source(model, tokenizer, queries, candidates, None, options)


def _source(
    model: Any,
    tokenizer: Any,
    queries: Dataset,
    abstracts: Dataset,
    num_candidates: int | None,
    options: TraceOptions,
) -> Source:
    queries = with_proponents(queries, abstracts, options.strict)
    queries, figures = answered(model, tokenizer, queries, options)
    return Source(model, tokenizer, queries, abstracts, num_candidates, figures)


def with_proponents(queries: Dataset, abstracts: Dataset, strict: bool) -> Dataset:
    """Leave out queries whose fact no row states; keep all where facts are unknown.

    Raises:
        ValueError: If none is left.
    """
    if not has_facts(queries, abstracts):
        return queries
    known = [i for i, rows in enumerate(proponents(queries, abstracts, strict)) if rows]
    if not known:
        raise ValueError("No candidate states the fact of any query: are these the right candidates?")
    if len(known) < len(queries):
        say(f"{len(queries) - len(known)} of {len(queries)} queries have no proponent: they are left out.")
    return queries.select(known)


def draw_candidates(queries: Dataset, abstracts: Dataset, num_candidates: int | None, seed: int) -> Dataset:
    """All abstracts, or as many as asked for: proponents, and distractors as FTRACE takes them."""
    if num_candidates is None or num_candidates >= len(abstracts):
        return abstracts
    candidates, counts = candidate_pool(queries, abstracts, num_candidates, seed)
    say("Candidates: " + ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in counts.items()))
    return candidates


def answered(model: Any, tokenizer: Any, queries: Dataset, options: TraceOptions) -> tuple[Dataset, dict[str, float]]:
    """Find the queries that the model answers exactly (column `answered`), and tell their share.

    Queries without a target column get the model's own answer, and no column `answered`.

    Raises:
        ValueError: If it answers none, and `unanswered` is not asked for.
    """
    adapter = ForwardInf(model, tokenizer).adapter
    complete = adapter.with_answers(queries)
    if complete is not queries:
        say("The queries have no targets: the model's own answers are traced.")
        return complete, {}
    target = adapter.columns[-1]
    if target not in queries.column_names:
        return queries, {}
    answers = adapter.answer(queries[:])
    right = [said.strip() == true.strip() for said, true in zip(answers, queries[target], strict=True)]
    say(f"The model answers {sum(right)} of {len(queries)} queries exactly ({np.mean(right):.0%}).")
    if not any(right) and not options.unanswered:
        raise ValueError(
            "The model answers none of the queries exactly, so there is nothing it knows to trace. "
            "Trace what it was taught anyway with --unanswered."
        )
    queries = queries.remove_columns([name for name in ("answered",) if name in queries.column_names])
    return queries.add_column("answered", right), {"answered": float(np.mean(right))}


def paraphrases(queries: Dataset, seed: int) -> tuple[Dataset, list[int]]:
    """Ask for the same facts in other words.

    Args:
        queries (`datasets.Dataset`): With `paraphrases`, a list of input texts a row.
        seed (`int`): Draws one of each list.

    Returns:
        `tuple`: Queries with a paraphrase as their input, and the rows that they came from.

    Raises:
        ValueError: If there is no such column, or it is empty everywhere.
    """
    if "paraphrases" not in queries.column_names or not any(queries["paraphrases"]):
        raise ValueError("No column `paraphrases` holds other wordings of the queries (a list of texts a row).")
    draw = np.random.default_rng(seed)
    rows = [i for i, texts in enumerate(queries["paraphrases"]) if texts]
    texts = [str(draw.choice(queries[i]["paraphrases"])) for i in rows]
    others = queries.select(rows).remove_columns("inputs_pretokenized").add_column("inputs_pretokenized", texts)
    return others.cast(queries.features), rows
