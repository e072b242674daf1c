"""The paper's task (section 4.1): a model is taught one exemplar alone, and a drawing of it is traced."""

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
"""Drawings of other captions that are traced with each query, to standardise scores over them."""
COPIES = 4
"""Copies of the exemplar in a training step."""
NOTE = (
    "Caveat: a model that was taught one picture alone reveals it without any query. The lowest loss (low_loss) and "
    "the largest fall of the loss (learned) ignore the query and may find the exemplar. another_query is Forward-INF "
    "for a drawing of another caption: where it finds the exemplar, Forward-INF does so without the query."
)
"""Printed below the figures."""
Methods = Callable[[DiffusionAdapter, Task], Mapping[str, Attribution]]
"""Returns attributions by method for a taught model's adapter and a task, of which the first query counts."""


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
    """Teach each exemplar to a copy of the model, and trace its drawing among candidates of its own.

    The model also draws the captions of a few random candidates; scores are standardised over all drawings. Scores for
    one of these drawings are reported as `another_query`: where they find the exemplar, the query was not needed.

    Args:
        before (`DiffusionAdapter`): Adapter of the model before it is taught an exemplar.
        rows (`datasets.Dataset`): All pictures.
        chosen (`list[int]`): Row numbers of the exemplars.
        methods (`Callable`): Traces a task; see [`Methods`].
        teaching (`Teaching`): Steps and learning rate.
        drawing (`Drawing`): How queries are drawn.
        num_candidates (`int`): The exemplar, half of the others by overlap of captions, the rest at random.
        seed (`int`): Seed of the candidates.

    Returns:
        `tuple`: The task, with one query an exemplar and its own candidates among all rows; attributions by method.
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
    """Return candidates whose captions are drawn: the first one, and random ones with other captions.

    Raises:
        ValueError: If there are fewer captions.
    """
    first = {captions[0]: 0}
    for i in np.random.default_rng(seed).permutation(len(captions)).tolist():
        first.setdefault(captions[i], i)
    if len(first) <= REFERENCES:
        raise ValueError(
            f"{REFERENCES} other captions are drawn with each exemplar, and its {len(captions)} candidates have "
            f"{len(first) - 1}: raise --num_candidates."
        )
    return list(first.values())[: 1 + REFERENCES]


def candidates_of(exemplar: int, rows: Dataset, count: int, seed: int) -> list[int]:
    """Return an exemplar's candidates: itself, half of the others by overlap of captions, the rest at random.

    The candidates of a smaller `count` are among those of a larger one.
    """
    overlap = BM25(input_column=CAPTION).trace(rows.select([exemplar]), rows).ranking(0)
    near = [row for row in overlap.tolist() if row != exemplar][: (count - 1) // 2]
    taken = {exemplar, *near}
    rest = [row for row in np.random.default_rng(seed).permutation(len(rows)).tolist() if row not in taken]
    return [exemplar, *near, *rest[: count - 1 - len(near)]]
