"""bergson: stores the gradients of queries, and scores candidates against them. Causal models only."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bergson.build import build_query
from bergson.cli.trackstar import trackstar
from bergson.config.config import (
    DataConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
    TrackstarConfig,
    TrackstarIndexConfig,
)
from bergson.data import load_scores
from bergson.hessians.pipeline import hessian_pipeline
from bergson.score.score import score_dataset
from datasets import Dataset

from peer_runs.measure import main
from peer_runs.task import Rows, Task


def gradients(task: Task, influence: Any = "gradient", cosine: bool = False) -> np.ndarray:
    """Return products of gradients; `influence="output"` computes them in forward mode, one pass for each query."""
    preprocess = PreprocessConfig(unit_normalize=cosine)
    build_query(_index(task, "query"), _queries(task), PreprocessConfig())
    score_dataset(_index(task, "scores"), ScoreConfig(query_path="query", token_influence=influence), preprocess)
    return _scores(Path("scores"))


def ekfac(task: Task, influence: Any = "gradient") -> np.ndarray:
    hessian_pipeline(
        _index(task, "ekfac"),
        HessianConfig(method="kfac", ev_correction=True),
        ScoreConfig(token_influence=influence),
        PreprocessConfig(),
        HessianPipelineConfig(query=_queries(task)),
    )
    return _scores(Path("ekfac/scores"))


def track_star(task: Task) -> np.ndarray:
    preprocess = PreprocessConfig(unit_normalize=True)
    index = _index(task, "trackstar", TrackstarIndexConfig)
    trackstar(index, TrackstarConfig(query=_queries(task), preprocess_cfg=preprocess))
    return _scores(Path("trackstar/scores"))


def _index(task: Task, run: str, kind: type[IndexConfig] = IndexConfig) -> IndexConfig:
    data = DataConfig(dataset=_saved(task.candidates, "rows"))
    return kind(run_path=run, model=str(task.folder / "model"), data=data)


def _queries(task: Task) -> QuerySetConfig:
    return QuerySetConfig(dataset=_saved(task.queries, "asked"))


def _saved(rows: Rows, name: str) -> str:
    if not Path(name).exists():
        columns = ("input_ids", "labels")
        Dataset.from_list([{column: row[column] for column in columns} for row in rows]).save_to_disk(name)
    return name


def _scores(folder: Path) -> np.ndarray:
    return load_scores(folder)[:].T


if __name__ == "__main__":
    main(
        {
            "cosine": partial(gradients, cosine=True),
            "output": partial(gradients, influence="output"),
            "ekfac": ekfac,
            "ekfac_output": partial(ekfac, influence="output"),
            "trackstar": track_star,
        }
    )
