"""This library: Forward-INF, and the baselines that it brings."""

from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from hf_forward_inf import ForwardInf
from hf_forward_inf.baselines import BM25, InfluenceFunctions, TracIn, TrackStar
from hf_forward_inf.processes import progress_bars
from peer_runs.measure import main
from peer_runs.task import Rows, Task


def forward_inf(task: Task) -> np.ndarray:
    return _trace(ForwardInf(*_model(task)), task.queries, task)


def forward_inf_one(task: Task) -> np.ndarray:
    """One query alone: the rows of the others stay empty."""
    scores = np.full((len(task.queries), len(task.candidates)), np.nan)
    scores[0] = _trace(ForwardInf(*_model(task)), task.queries[:1], task)
    return scores


def gradients(kind: Any, task: Task, **options: Any) -> np.ndarray:
    return _trace(kind(*_model(task), **options), task.queries, task)


def bm25(task: Task) -> np.ndarray:
    return _trace(BM25(), task.queries, task)


def _model(task: Task) -> tuple[Any, Any]:
    return task.model, AutoTokenizer.from_pretrained(task.folder / "model")


def _trace(attributor: Any, queries: Rows, task: Task) -> np.ndarray:
    with progress_bars(False):
        return attributor.trace(_texts(queries), _texts(task.candidates)).scores


def _texts(rows: Rows) -> Dataset:
    return Dataset.from_list([{name: row[name] for name in row if name.endswith("_pretokenized")} for row in rows])


if __name__ == "__main__":
    main(
        {
            "forward_inf": forward_inf,
            "forward_inf_one": forward_inf_one,
            "tracin_cosine": partial(gradients, TracIn, similarity="cosine"),
            "trackstar": partial(gradients, TrackStar),
            "influence_functions": partial(gradients, InfluenceFunctions),
            "bm25": bm25,
        }
    )
