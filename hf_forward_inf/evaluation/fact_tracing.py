"""Fact tracing as FTRACE does it: which queries are asked, among which candidates, and which are reported apart."""

from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from hf_forward_inf.data import proponents
from hf_forward_inf.evaluation.candidate_sets import candidate_pool, own_candidates
from hf_forward_inf.evaluation.task import MAIN, Task, has_facts
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.rows import sample_rows


def with_proponents(queries: Dataset, sentences: Dataset, strict: bool = False) -> Dataset:
    """Leave out queries whose fact no sentence states; return all where facts are unknown.

    Raises:
        ValueError: If none is left.
    """
    if not has_facts(queries, sentences):
        return queries
    known = [i for i, rows in enumerate(proponents(queries, sentences, strict)) if rows]
    if not known:
        raise ValueError("No candidate states the fact of any query: are these the right candidates?")
    if len(known) < len(queries):
        say(f"{len(queries) - len(known)} of {len(queries)} queries have no proponent: they are left out.")
    return queries.select(known)


def with_answered(adapter: Any, queries: Dataset) -> Dataset:
    """Return the queries with a column `answered`: whether the model's answer is the target.

    Queries without a target get the model's own answer, and no column `answered`.

    Args:
        adapter (`LanguageAdapter`): The adapter of the model that answers.
        queries (`datasets.Dataset`): The queries.
    """
    complete = adapter.with_answers(queries)
    if complete is not queries:
        say("The queries have no targets: the model's own answers are traced.")
        return complete
    target = adapter.columns[-1]
    if target not in queries.column_names:
        return queries
    answers = adapter.answer(queries[:])
    right = [given.strip() == true.strip() for given, true in zip(answers, queries[target], strict=True)]
    say(f"The model answers {sum(right)} of {len(queries)} queries exactly ({np.mean(right):.0%}).")
    queries = queries.remove_columns([name for name in ("answered",) if name in queries.column_names])
    return queries.add_column("answered", right)


def draw_task(
    queries: Dataset,
    sentences: Dataset,
    *,
    num_queries: int,
    num_candidates: int | None = None,
    own: bool = False,
    unanswered: bool = False,
    paraphrased: bool = False,
    strict: bool = False,
    seed: int = 0,
) -> Task:
    """Draw queries, and candidates for them.

    Args:
        queries (`datasets.Dataset`): All queries. Only answered ones are drawn if there is a column `answered`.
        sentences (`datasets.Dataset`): All training sentences.
        num_queries (`int`): Queries drawn at most.
        num_candidates (`int`, *optional*): Candidates: the queries' proponents, filled up with distractors. Defaults
            to all sentences.
        own (`bool`, defaults to `False`): Draw candidates for each query separately, as FTRACE does.
        unanswered (`bool`, defaults to `False`): Also draw as many queries that the model answers wrongly.
        paraphrased (`bool`, defaults to `False`): Also ask each query in other words.
        strict (`bool`, defaults to `False`): Proponents are only candidates in which the queried object is masked.
        seed (`int`, defaults to 0): Draws all of it.

    Returns:
        `Task`: Its groups are `""`, and `answered`, `unanswered` and `paraphrased` where asked for.

    Raises:
        ValueError: If the model answers none of the queries and unanswered ones are not asked for, or there are no
            paraphrases.
    """
    drawn, groups = _draw_queries(queries, num_queries, unanswered, seed)
    sets = None
    if own:
        candidates, sets = own_candidates(drawn, sentences, seed=seed)
        say(f"Candidates: {np.mean([len(rows) for rows in sets]):.0f} a query, {len(candidates):,} in all.")
    else:
        candidates = draw_candidates(drawn, sentences, num_candidates, seed)
    if paraphrased:
        others, originals = paraphrases(drawn, seed)
        groups["paraphrased"] = list(range(len(drawn), len(drawn) + len(others)))
        drawn = concatenate_datasets([drawn, others])
        sets = None if sets is None else sets + [sets[i] for i in originals]
    truth = proponents(drawn, candidates, strict) if has_facts(drawn, candidates) else None
    if sets is not None and truth is not None:  # of equal sentences a set holds one
        truth = [[row for row in rows if row in set(mine)] for rows, mine in zip(truth, sets, strict=True)]
    return Task(drawn, candidates, truth, groups, sets)


def _draw_queries(queries: Dataset, count: int, unanswered: bool, seed: int) -> tuple[Dataset, dict[str, list[int]]]:
    if "answered" not in queries.column_names:
        drawn = sample_rows(queries, count, seed)
        return drawn, {MAIN: list(range(len(drawn)))}
    known = np.array(queries["answered"], dtype=bool)
    if not known.any() and not unanswered:
        raise ValueError(
            "The model answers none of the queries exactly, so there is nothing it knows to trace. Trace what it was "
            "taught anyway with --unanswered."
        )
    kinds = [queries.select(np.flatnonzero(known == kind)) for kind in (True, False)]
    right, wrong = (sample_rows(rows, count, seed) for rows in kinds)
    if not unanswered:
        return right, {MAIN: list(range(len(right)))}
    drawn = concatenate_datasets([right, wrong])
    groups = {MAIN: list(range(len(drawn)))}
    if len(right) and len(wrong):
        groups["answered"] = list(range(len(right)))
        groups["unanswered"] = list(range(len(right), len(drawn)))
    return drawn, groups


def draw_candidates(queries: Dataset, sentences: Dataset, num_candidates: int | None, seed: int) -> Dataset:
    """Return all sentences, or as many as asked for: proponents, and distractors as FTRACE draws them."""
    if num_candidates is None or num_candidates >= len(sentences):
        return sentences
    candidates, counts = candidate_pool(queries, sentences, num_candidates, seed)
    say("Candidates: " + ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in counts.items()))
    return candidates


def paraphrases(queries: Dataset, seed: int) -> tuple[Dataset, list[int]]:
    """Return queries that ask for the same facts in other words.

    Args:
        queries (`datasets.Dataset`): With `paraphrases`, a list of input texts for each row.
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
