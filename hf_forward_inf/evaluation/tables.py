"""Attributors side by side: figures by method and by group of queries, and what each has found in a given time."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from hf_forward_inf.attribution import Attribution
from hf_forward_inf.data.ftrace import word_overlap
from hf_forward_inf.evaluation.cost import Pace
from hf_forward_inf.evaluation.task import Task
from hf_forward_inf.scores.metrics import evaluate, random_figures, recalls_at_k, reciprocal_ranks, worst_hub
from hf_forward_inf.utils.rows import fill_in, text_and_target, text_columns

Table: TypeAlias = dict[str, dict[str, float]]
"""Figures by method: `{"bm25": {"mrr": ..., "paraphrased/mrr": ...}}`."""

LITTLE_OVERLAP = 0.5
"""A proponent with at most this share of the query's words (answer included) overlaps with it little."""
REFERENCE = "forward_inf"
"""The method that the others are paired with."""


def detected(scores: np.ndarray, task: Task) -> dict[str, float]:
    """How often the proponent is first, or among the first five, by group of queries."""
    assert task.proponents is not None
    figures = {}
    for group, rows in task.groups.items():
        truth = [task.proponents[i] for i in rows]
        for k in (1, 5):
            name = f"{group}/top{k}" if group else f"top{k}"
            figures[name] = float(recalls_at_k(scores[rows], truth, k).mean())
    return figures


def compare(found: Mapping[str, Attribution], task: Task) -> Table:
    """Compare every attributor with the truth, a random order beside them; nothing where the truth is unknown.

    Beside [`metrics.evaluate`]: `worst_hub`; `low_overlap/mrr` and `low_overlap/recall@10`, over the proponents that
    share little with the query's words, the others left out; for each other method `mrr_behind` and
    `recall@10_behind`, by how much it stands behind Forward-INF, query by query, with `_se`. Groups of queries come
    under their names (`answered/mrr`, `paraphrased/mrr`).

    Args:
        found (`dict[str, Attribution]`): Every score kept, not only the best.
        task (`Task`): Groups and truth.
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
    """Name figures as `metrics.json` does: Forward-INF's stand bare, the others' under their method."""
    named = [_under("" if method == REFERENCE else method, figures) for method, figures in table.items()]
    return {name: value for figures in named for name, value in figures.items()}


def among_own(scores: np.ndarray, task: Task) -> np.ndarray:
    """Take the scores of candidates that are not in a query's own set away."""
    if task.own is None:
        return scores
    kept = np.full_like(scores, np.nan)
    for row, own in enumerate(task.own):
        kept[row, own] = scores[row, own]
    return kept


def _with_little_overlap(task: Task) -> list[list[int]]:
    """For each query, the proponents that share little with its words."""
    assert task.proponents is not None
    columns = text_columns(set(task.queries.column_names) & set(task.candidates.column_names))
    if columns is None:
        return [[] for _ in task.proponents]
    asked, told = (
        [fill_in(*text_and_target(row, columns)) for row in rows] for rows in (task.queries, task.candidates)
    )
    return [
        [row for row in rows if word_overlap(query, told[row]) <= LITTLE_OVERLAP]
        for query, rows in zip(asked, task.proponents, strict=True)
    ]


def _low_overlap(scores: np.ndarray, truth: Sequence[list[int]], few: Sequence[list[int]]) -> dict[str, float]:
    rows = [i for i, some in enumerate(few) if some]
    if not rows:
        return {}
    scores = scores[rows]
    for row, i in enumerate(rows):  # rows were picked out above, so that this is a copy
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
            figures[f"{name}_behind_se"] = float(behind.std(ddof=1) / len(behind) ** 0.5)
    return figures


def average(tables: Sequence[Table]) -> Table:
    """Average tables of several samples; standard errors are then those over the samples (the paper's Table 3)."""
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
                result[method][f"{key}_se"] = float(values.std(ddof=1) / len(values) ** 0.5)
    return result


def mrr_after(
    seconds: np.ndarray, scores: np.ndarray, truth: Sequence[Sequence[int]], order: np.ndarray, pace: Pace
) -> np.ndarray:
    """MRR of what has been found after some seconds: candidates not inspected yet rank last (the paper's Table 3).

    Args:
        seconds (`np.ndarray`): Points in time.
        scores (`np.ndarray`): `[queries, candidates]`.
        truth (`Sequence[Sequence[int]]`): Each query's proponents.
        order (`np.ndarray`): Candidates in the order in which they are inspected, `[queries, inspected]`.
        pace (`Pace`): How fast.

    Returns:
        `np.ndarray`: `[seconds]`.
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
    """Lay the main figures out for a terminal, one table for each group of queries.

    Where they were measured: passes over the candidates, for a query alone and for all queries together.
    """
    measured = [key.split("/") for key in next(iter(table.values())) if key.endswith("/mrr")]
    groups = ["", *(group for group, *rest in measured if len(rest) == 1 and group != "low_overlap")]
    return "\n\n".join((f"{group}:\n" if group else "") + _group_as_text(table, costs, group) for group in groups)


def _group_as_text(table: Table, costs: Mapping[str, float], group: str) -> str:
    before = f"{group}/" if group else ""
    columns = ["precision@1", "recall@1", "recall@5", "recall@10", "low_overlap/mrr", "worst_hub"]
    columns = [name for name in columns if any(before + name in figures for figures in table.values())]
    timed = {"one query": "forward_passes_alone", "all queries": "forward_passes_together"}
    timed = {head: key for head, key in timed.items() if any(f"{method}/{key}" in costs for method in table)}
    width = max(map(len, table))
    heads = "".join(f"{name:>{max(11, len(name) + 2)}}" for name in [*columns, *timed])
    lines = [f"{'':{width}}  {'mrr (s.e.)':>13}{heads}"]
    for method, figures in table.items():
        error = f" ({figures[before + 'mrr_se']:.3f})" if before + "mrr_se" in figures else " " * 8
        cells = [(name, figures.get(before + name), 3) for name in columns]
        cells += [(head, costs.get(f"{method}/{key}"), 1) for head, key in timed.items()]
        rest = "".join(
            " " * max(11, len(name) + 2) if value is None else f"{value:{max(11, len(name) + 2)}.{digits}f}"
            for name, value, digits in cells
        )
        lines.append(f"{method:{width}}  {figures[before + 'mrr']:5.3f}{error}{rest}")
    return "\n".join(lines)
