"""Tables of metrics by attributor and by group of queries, and what has been found after a given time."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from hf_forward_inf.attribution import Attribution
from hf_forward_inf.data.ftrace import word_overlap
from hf_forward_inf.evaluation.cost import Pace
from hf_forward_inf.evaluation.task import MAIN, Task
from hf_forward_inf.scores.intervals import standard_error
from hf_forward_inf.scores.metrics import evaluate, random_figures, recalls_at_k, reciprocal_ranks, worst_hub
from hf_forward_inf.utils.rows import fill_in, text_and_target, text_columns
from hf_forward_inf.utils.text_tables import number, text_table

Table: TypeAlias = dict[str, dict[str, float]]
"""Metrics by method: `{"bm25": {"mrr": ..., "paraphrased/mrr": ...}}`."""

LITTLE_OVERLAP = 0.5
"""Largest share of the query's words (answer included) in a proponent of low overlap."""
REFERENCE = "forward_inf"
"""The method that all others are compared with, query by query."""


def detected(scores: np.ndarray, task: Task) -> dict[str, float]:
    """Return the recall of proponents at rank 1 and 5, `top1` and `top5`, by group of queries."""
    assert task.proponents is not None
    figures: dict[str, float] = {}
    for group, rows in task.groups.items():
        truth = [task.proponents[i] for i in rows]
        for k in (1, 5):
            figures |= _under(group, {f"top{k}": float(recalls_at_k(scores[rows], truth, k).mean())})
    return figures


def compare(found: Mapping[str, Attribution], task: Task) -> Table:
    """Return the metrics of every attributor and of a random order; an empty table if no proponents are known.

    The metrics are those of [`metrics.evaluate`]; `worst_hub`; `low_overlap/mrr` and `low_overlap/recall@10`, where
    only proponents that share few words with the query count; and for all but Forward-INF `mrr_behind` and
    `recall@10_behind`, Forward-INF's value minus theirs, the mean over queries with its standard error `_se`. Metrics
    of a group of queries are prefixed with its name (`answered/mrr`, `paraphrased/mrr`).

    Args:
        found (`dict[str, Attribution]`): Attributions with all scores, by attributor.
        task (`Task`): Groups of queries, and proponents.
    """
    if task.proponents is None:
        return {}
    table: Table = {method: {} for method in [*found, "random"]}
    few = _with_little_overlap(task)
    for group, rows in task.groups.items():
        truth = [task.proponents[i] for i in rows]
        for method, attribution in found.items():
            scores = among_own(attribution.dense(), task)[rows]
            figures = {**evaluate(scores, truth), "worst_hub": worst_hub(scores)}
            figures |= _low_overlap(scores, truth, [few[i] for i in rows])
            if method != REFERENCE and REFERENCE in found:
                reference = among_own(found[REFERENCE].dense(), task)[rows]
                figures |= _behind(reference, scores, truth)
            table[method] |= _under(group, figures)
        sizes = [len(task.candidates) if task.own is None else len(task.own[i]) for i in rows]
        chance = random_figures(round(np.mean(sizes)), [len(own) for own in truth])
        table["random"] |= _under(group, chance)
    return table


def _under(group: str, figures: Mapping[str, float]) -> dict[str, float]:
    return {f"{group}/{name}" if group else name: value for name, value in figures.items()}


def flat(table: Table) -> dict[str, float]:
    """Return metrics under the names of `metrics.json`: Forward-INF's without a prefix, others under their method."""
    named = [_under("" if method == REFERENCE else method, figures) for method, figures in table.items()]
    return {name: value for figures in named for name, value in figures.items()}


def among_own(scores: np.ndarray, task: Task) -> np.ndarray:
    """Return scores with NaN for candidates that are not in a query's own set."""
    if task.own is None:
        return scores
    kept = np.full_like(scores, np.nan)
    for row, own in enumerate(task.own):
        kept[row, own] = scores[row, own]
    return kept


def _with_little_overlap(task: Task) -> list[list[int]]:
    """Return, for each query, the proponents that share few words with it."""
    assert task.proponents is not None
    columns = text_columns(set(task.queries.column_names) & set(task.candidates.column_names))
    if columns is None:
        return [[] for _ in task.proponents]
    of_queries, of_candidates = (
        [fill_in(*text_and_target(row, columns)) for row in rows] for rows in (task.queries, task.candidates)
    )
    return [
        [row for row in rows if word_overlap(query, of_candidates[row]) <= LITTLE_OVERLAP]
        for query, rows in zip(of_queries, task.proponents, strict=True)
    ]


def _low_overlap(scores: np.ndarray, truth: Sequence[list[int]], few: Sequence[list[int]]) -> dict[str, float]:
    rows = [i for i, some in enumerate(few) if some]
    if not rows:
        return {}
    scores = scores[rows]
    for row, i in enumerate(rows):  # indexing with a list has made a copy
        scores[row, sorted(set(truth[i]) - set(few[i]))] = np.nan
    figures = evaluate(scores, [few[i] for i in rows])
    names = ("mrr", "mrr_se", "recall@10")
    return {"low_overlap/queries": len(rows), **{f"low_overlap/{k}": figures[k] for k in names if k in figures}}


def _behind(reference: np.ndarray, scores: np.ndarray, truth: Sequence[list[int]]) -> dict[str, float]:
    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "mrr": lambda one: reciprocal_ranks(one, truth),
        "recall@10": lambda one: recalls_at_k(one, truth, 10),
    }
    figures = {}
    for name, measure in measures.items():
        behind = measure(reference) - measure(scores)
        figures[f"{name}_behind"] = float(behind.mean())
        if len(behind) > 1:
            figures[f"{name}_behind_se"] = standard_error(behind)
    return figures


def average(tables: Sequence[Table]) -> Table:
    """Return the mean of several samples' tables, with standard errors over samples (the paper's Table 3)."""
    if len(tables) == 1:
        return tables[0]
    result: Table = {}
    for method in tables[0]:
        columns = {key: [table[method].get(key) for table in tables] for key in tables[0][method]}
        known = {key: np.array(values) for key, values in columns.items() if None not in values}
        result[method] = {key: float(values.mean()) for key, values in known.items()}
        for key, values in known.items():
            measure = key.rpartition("/")[2]
            if measure == "mrr" or measure.startswith(("precision@", "recall@")):
                result[method][f"{key}_se"] = standard_error(values)
    return result


def mrr_after(
    seconds: np.ndarray, scores: np.ndarray, truth: Sequence[Sequence[int]], order: np.ndarray, pace: Pace
) -> np.ndarray:
    """Return the MRR after some seconds: candidates that are not scored yet rank last (the paper's Table 3).

    Args:
        seconds (`np.ndarray`): Points in time.
        scores (`np.ndarray`): Scores, `[queries, candidates]`.
        truth (`Sequence[Sequence[int]]`): Each query's proponents.
        order (`np.ndarray`): Row numbers of candidates in the order in which they are scored, `[queries, scored]`.
        pace (`Pace`): Progress through the candidates.

    Returns:
        `np.ndarray`: The mean over queries, `[seconds]`.
    """
    result = []
    for moment in seconds:
        share = pace.inspected(moment)
        seen = scores if share == 1 else np.full_like(scores, np.nan)
        if share < 1:
            rows = order[:, : int(share * order.shape[1])]
            np.put_along_axis(seen, rows, np.take_along_axis(scores, rows, axis=1), axis=1)
        result.append(reciprocal_ranks(seen, truth).mean())
    return np.array(result)


def as_text(table: Table, costs: Mapping[str, float]) -> str:
    """Return the main metrics as text, one table for each group of queries.

    Args:
        table (`Table`): Metrics by method.
        costs (`Mapping[str, float]`): Costs as in [`Comparison`]; passes over the candidates are shown if measured.
    """
    measured = [key.split("/") for key in next(iter(table.values())) if key.endswith("/mrr")]
    groups = [MAIN, *(group for group, *rest in measured if len(rest) == 1 and group != "low_overlap")]
    return "\n\n".join((f"{group}:\n" if group else "") + _group_as_text(table, costs, group) for group in groups)


def _group_as_text(table: Table, costs: Mapping[str, float], group: str) -> str:
    before = f"{group}/" if group else ""
    columns = ["precision@1", "recall@1", "recall@5", "recall@10", "low_overlap/mrr", "worst_hub"]
    columns = [name for name in columns if any(before + name in figures for figures in table.values())]
    timed = {"one query": "forward_passes_alone", "all queries": "forward_passes_together"}
    timed = {head: key for head, key in timed.items() if any(f"{method}/{key}" in costs for method in table)}
    rows = [["", "mrr", "(s.e.)", *columns, *timed]]
    for method, figures in table.items():
        error = figures.get(f"{before}mrr_se")
        cells = [number(figures[f"{before}mrr"]), "" if error is None else f"({error:.3f})"]
        cells += [number(figures.get(before + name)) for name in columns]
        rows.append([method, *cells, *(number(costs.get(f"{method}/{key}"), ".1f") for key in timed.values())])
    return text_table(rows)
