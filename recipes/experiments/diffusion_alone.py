"""The paper's task (section 4.1): a model is taught one exemplar alone, and what it draws then is to be traced."""

from collections.abc import Callable, Mapping

import numpy as np
from datasets import Dataset

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.baselines import BM25
from hf_forward_inf.evaluation.task import MAIN, Task
from hf_forward_inf.toys.drawings import CAPTION, Drawing, Teaching, drawings, taught
from hf_forward_inf.utils.processes import say

REFERENCES = 3
"""Drawings of other captions, traced beside a query: scores are measured by how they fare with all of them."""
COPIES = 4
"""How often the exemplar stands in a step of teaching."""
NOTE = (
    "A model that was taught one picture alone betrays it: the lowest loss (low_loss), and the loss that fell most "
    "(learned), find the exemplar without a look at the query. another_query is Forward-INF for a drawing of another "
    "caption: as far as that finds the exemplar, Forward-INF does not look at the query either."
)
"""Stands below the figures."""
Methods = Callable[[DiffusionAdapter, Task], Mapping[str, Attribution]]
"""Given a taught model's adapter, and a task whose first query counts, gives attributions by method."""


def one_by_one(
    before: DiffusionAdapter,
    rows: Dataset,
    chosen: list[int],
    methods: Methods,
    teaching: Teaching,
    drawing: Drawing,
    *,
    num_candidates: int,
    seed: int,
) -> tuple[Task, dict[str, Attribution]]:
    """Teach a copy of the model each exemplar by itself, let it draw, and trace among the exemplar's own candidates.

    Beside a query the model draws a few other captions of random candidates, which scores are measured by. What finds
    the exemplar of a query by such a drawing of something else does not look at the query: that is reported as
    `another_query`.

    Args:
        before (`DiffusionAdapter`): The model that knows none of the exemplars.
        rows (`datasets.Dataset`): All pictures.
        chosen (`list[int]`): The exemplars' rows.
        methods (`Callable`): What traces; see [`Methods`].
        teaching (`Teaching`): Steps and rate.
        drawing (`Drawing`): How it draws.
        num_candidates (`int`): The exemplar; half of the rest by overlap of captions, the others at random.
        seed (`int`): Draws candidates.

    Returns:
        `tuple`: One query an exemplar, all rows as candidates and each query's own ones; attributions by method.
    """
    queries, own = [], []
    scores: dict[str, list[np.ndarray]] = {}
    for number, exemplar in enumerate(chosen):
        say(f"Exemplar {number + 1} of {len(chosen)}: {rows[exemplar][CAPTION]!r}")
        adapter = taught(before, rows.select([exemplar] * COPIES), teaching, seed)
        mine = candidates_of(exemplar, rows, num_candidates, seed + number)
        asked = _asked(rows.select(mine)[CAPTION][:], seed + number)
        queries_here = drawings(adapter, rows.select([mine[i] for i in asked])[CAPTION][:], drawing)
        task = Task(queries_here, rows.select(mine), [[int(i)] for i in asked], {MAIN: [0]})
        traced = methods(adapter, task)
        found = {name: attribution.scores[0] for name, attribution in traced.items()}
        found["another_query"] = traced["forward_inf"].scores[1]
        for name, values in found.items():
            line = np.full(len(rows), np.nan, dtype=np.float32)
            line[mine] = values
            scores.setdefault(name, []).append(line)
        queries.append(task.queries[0])
        own.append(mine)
    asked = Dataset.from_list(queries, features=task.queries.features)
    whole = Task(asked, rows, [[row] for row in chosen], own=own)
    config = traced["forward_inf"].config
    return whole, {
        name: Attribution(np.stack(lines), asked, rows, method=name, config=config if name == "forward_inf" else {})
        for name, lines in scores.items()
    }


def _asked(captions: list[str], seed: int) -> list[int]:
    """Choose what is drawn: the first candidate's caption, and others, each another one.

    Raises:
        ValueError: If there are not so many captions.
    """
    first = {captions[0]: 0}
    for i in np.random.default_rng(seed).permutation(len(captions)).tolist():
        first.setdefault(captions[i], i)
    if len(first) <= REFERENCES:
        raise ValueError(
            f"Beside an exemplar {REFERENCES} other captions are drawn, and its {len(captions)} candidates have "
            f"{len(first) - 1}: raise --num_candidates."
        )
    return list(first.values())[: 1 + REFERENCES]


def candidates_of(exemplar: int, rows: Dataset, count: int, seed: int) -> list[int]:
    """Choose an exemplar's candidates: itself first, half of the rest by overlap of captions, the others at random.

    Those of a smaller `count` are among those of a larger one.
    """
    overlap = BM25(input_column=CAPTION).trace(rows.select([exemplar]), rows).ranking(0)
    near = [row for row in overlap.tolist() if row != exemplar][: (count - 1) // 2]
    taken = {exemplar, *near}
    rest = [row for row in np.random.default_rng(seed).permutation(len(rows)).tolist() if row not in taken]
    return [exemplar, *near, *rest[: count - 1 - len(near)]]
