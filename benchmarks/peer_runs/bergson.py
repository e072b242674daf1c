"""bergson: gradients through the inverse curvature, by its own pipelines. Causal models only.

Its pipelines store what they have computed, and skip with `resume` what is there; what depends on the queries is
removed first.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bergson.approx_unrolling.pipeline import approx_unrolling_pipeline
from bergson.build import build, build_query
from bergson.cli.trackstar import trackstar
from bergson.cli.trak import trak
from bergson.config.config import (
    ApproxUnrollingConfig,
    AstraConfig,
    DataConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    InversionConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
    TrackstarConfig,
    TrackstarIndexConfig,
    TrakConfig,
)
from bergson.data import column_offsets, load_gradients, load_scores
from bergson.hessians import astra
from bergson.hessians.pipeline import hessian_pipeline
from bergson.query.attributor import Attributor
from bergson.score.score import score_dataset
from datasets import Dataset

from peer_runs.measure import main
from peer_runs.task import Rows, Task

PER_QUERY = ("query", "query_hessian", "mixed_hessian", "kfac_query", "shampoo_query", "astra_query", "scores")
"""Folders of a run that belong to its queries."""
# On the CPU, ASTRA writes into the rows that it maps from a file to read: a segmentation fault (2.5.1).
astra.load_gradients = lambda path: np.array(load_gradients(path))

TRAK_DIMENSION = 256
"""Of the random projection; more than there are candidates can't be inverted without damping."""


def gradients(task: Task, influence: Any = "gradient", cosine: bool = False, reduction: Any = "sum") -> np.ndarray:
    """Return products of gradients; `influence="output"` computes them in forward mode, one pass for each query."""
    run = _run("gradients", reduction)
    build_query(_index(task, f"{run}/query", reduction), _queries(task), PreprocessConfig())
    score_cfg = ScoreConfig(query_path=f"{run}/query", token_influence=influence)
    score_dataset(_index(task, f"{run}/scores", reduction), score_cfg, PreprocessConfig(unit_normalize=cosine))
    return _scores(f"{run}/scores")


def hessian(
    task: Task,
    method: Any = "kfac",
    influence: Any = "gradient",
    damping: float = 0.1,
    reduction: Any = "sum",
    inversion: Any = "damped_inverse",
    tokens: int = 0,
    **refined: Any,
) -> np.ndarray:
    """Return influence through Kronecker factors with corrected eigenvalues, refined by ASTRA if it has steps.

    Each step takes a batch of about so many tokens: rows of tasks differ in length.
    """
    run = _run(method, reduction)
    if tokens:
        length = sum(len(row["input_ids"]) for row in task.candidates) / len(task.candidates)
        refined["batch_size"] = round(tokens / length)
    hessian_pipeline(
        _index(task, run, reduction),
        HessianConfig(method=method, ev_correction=True),
        ScoreConfig(token_influence=influence),
        PreprocessConfig(),
        HessianPipelineConfig(
            query=_queries(task), inversion_cfg=InversionConfig(inversion=inversion, damping_factor=damping),
            astra=AstraConfig(**refined), resume=True,
        ),
    )  # fmt: skip
    return _scores(f"{run}/scores")


def source(task: Task, adam: bool = False, damping: float = 0.1, segments: int = 3) -> np.ndarray:
    """Return SOURCE's scores over the checkpoints of the training; proponents lower the loss there."""
    run, kept = _run("source", "sum"), task.facts["checkpoints"]
    for folder in Path(run).glob("segment_*/query_grad*"):
        shutil.rmtree(folder)
    each = len(kept["rates"]) // segments
    approx_unrolling_pipeline(
        _index(task, run, "sum", overwrite=False),
        HessianConfig(method="kfac", ev_correction=True),
        ApproxUnrollingConfig(
            checkpoints=[str(task.folder / "checkpoints" / str(i)) for i in range(len(kept["rates"]))],
            segments=segments,
            lr_list=[float(np.mean(kept["rates"][i * each : (i + 1) * each])) for i in range(segments)],
            step_size_list=[sum(kept["steps"][i * each : (i + 1) * each]) for i in range(segments)],
            use_adam_preconditioner=adam, query=_queries(task), inversion_cfg=InversionConfig(damping_factor=damping),
        ),
    )  # fmt: skip
    return -_scores(f"{run}/scores")


def track_star(task: Task, damping: float = 0.1, dimension: int = 16, reduction: Any = "sum") -> np.ndarray:
    run = _run("trackstar", f"{reduction}-{dimension}")
    index = _index(task, run, reduction, TrackstarIndexConfig, projection_dim=dimension)
    preprocess = PreprocessConfig(unit_normalize=True, inversion_cfg=InversionConfig(damping_factor=damping))
    trackstar(index, TrackstarConfig(query=_queries(task), preprocess_cfg=preprocess, resume=True))
    return _scores(f"{run}/scores")


def trak_scores(task: Task, damping: float = 0.0) -> np.ndarray:
    run = _run("trak", "sum")
    index = _index(
        task, run, "sum", TrackstarIndexConfig, projection_dim=TRAK_DIMENSION, loss_fn="log_odds",
        projection_target="global",
    )  # fmt: skip
    preprocess = PreprocessConfig(inversion_cfg=InversionConfig(damping_factor=damping))
    trak(index, TrakConfig(query=_queries(task), preprocess_cfg=preprocess, resume=True))
    return _scores(f"{run}/scores")


def stored(task: Task, factors: bool = False, cosine: bool = False) -> np.ndarray:
    """Look queries up in an index of the candidates' gradients, which is made once; with EK-FAC's factors if asked."""
    run = _run("index", "sum")
    if not Path(run, "gradients").exists():
        build(_index(task, f"{run}/gradients", "sum"), PreprocessConfig())
        if factors:
            from bergson.hessians.hessian_approximations import approximate_hessians

            approximate_hessians(_index(task, f"{run}/kfac", "sum"), HessianConfig(method="kfac", ev_correction=True))
    build_query(_index(task, f"{run}/query", "sum"), _queries(task), PreprocessConfig())
    found = Attributor(
        f"{run}/gradients", unit_norm=cosine, hessian_path=f"{run}/kfac" if factors else None, ev_correction=factors
    )
    best = found.search(_loaded(Path(run, "query")), None)
    return torch.zeros_like(best[0]).scatter_(1, best[1], best[0]).numpy()


def _loaded(folder: Path) -> dict[str, torch.Tensor]:
    sizes = json.loads((folder / "info.json").read_text())["grad_sizes"]
    values = torch.from_numpy(np.array(load_gradients(folder)))
    return {name: values[:, first:last] for name, (first, last) in column_offsets(sizes).items()}


def _run(method: str, settings: str) -> str:
    """Return the folder of a method's run, without what belongs to earlier queries."""
    run = Path(f"{method}-{settings}")
    for name in PER_QUERY:
        shutil.rmtree(run / name, ignore_errors=True)
    shutil.rmtree("asked", ignore_errors=True)
    return str(run)


def _index(task: Task, run: str, reduction: Any, kind: type[IndexConfig] = IndexConfig, **options: Any) -> IndexConfig:
    data = DataConfig(dataset=_saved(task.candidates, "rows"))
    model = str(task.folder / "model")
    return kind(run_path=run, model=model, data=data, loss_reduction=reduction, **options)


def _queries(task: Task) -> QuerySetConfig:
    return QuerySetConfig(dataset=_saved(task.queries, "asked"))


def _saved(rows: Rows, name: str) -> str:
    if not Path(name).exists():
        columns = ("input_ids", "labels")
        Dataset.from_list([{column: row[column] for column in columns} for row in rows]).save_to_disk(name)
    return name


def _scores(folder: str) -> np.ndarray:
    return np.array(load_scores(Path(folder))[:]).T


if __name__ == "__main__":
    main(
        {
            "dot": gradients,
            "cosine": partial(gradients, cosine=True),
            "output": partial(gradients, influence="output"),
            "ekfac": hessian,
            "ekfac_output": partial(hessian, influence="output"),
            "ekfac_stored": partial(stored, factors=True),
            "cosine_stored": partial(stored, cosine=True),
            "shampoo": partial(hessian, method="shampoo"),
            "ekfac_cg": partial(hessian, solver="cg"),
            "astra": hessian,
            "source": source,
            "source_adam": partial(source, adam=True),
            "trackstar": track_star,
            "trak": trak_scores,
        }
    )
