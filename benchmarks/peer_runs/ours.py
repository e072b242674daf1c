"""This library: Forward-INF and its baselines."""

from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.baselines import attributors_for
from hf_forward_inf.utils.processes import progress_bars
from hf_forward_inf.utils.rows import SENTINEL, fill_in, without_sentinels
from peer_runs.measure import main
from peer_runs.task import Rows, Task

BASELINES = ("tracin_cosine", "trackstar", "influence_functions", "bm25")


def forward_inf(task: Task, **options: Any) -> np.ndarray:
    return _trace(ForwardInf(*_model(task), **options), task.queries, task)


def forward_inf_one(task: Task) -> np.ndarray:
    """Trace one query alone; the other rows of scores are NaN."""
    scores = np.full((len(task.queries), len(task.candidates)), np.nan)
    scores[0] = _trace(ForwardInf(*_model(task)), task.queries[:1], task)
    return scores


def tuned(task: Task) -> np.ndarray:
    """Trace with the radius that self-retrieval chooses; its passes are included in the cost."""
    tracer = ForwardInf(*_model(task)).tune(Dataset.from_list([_row(task, row, False) for row in task.candidates]))
    return _trace(tracer, task.queries, task)


def baseline(name: str, task: Task) -> np.ndarray:
    return _trace(attributors_for(ForwardInf(*_model(task)), [name])[name], task.queries, task)


def _model(task: Task) -> tuple[Any, Any]:
    return task.model, AutoTokenizer.from_pretrained(task.folder / "model")


def _trace(attributor: Any, queries: Rows, task: Task) -> np.ndarray:
    asked, candidates = (
        Dataset.from_list([_row(task, row, kind) for row in rows])
        for rows, kind in ((queries, True), (task.candidates, False))
    )
    with progress_bars(False):
        return attributor.trace(asked, candidates).scores


def _row(task: Task, row: dict[str, Any], asked: bool) -> dict[str, str]:
    """Return the columns that the model reads: for a causal model the sentence, and a query's answer in it."""
    inputs, target = row["inputs_pretokenized"], row["targets_pretokenized"]
    if task.kind == "seq2seq":
        return {"inputs_pretokenized": inputs, "targets_pretokenized": target}
    text = fill_in(inputs, target)
    if not asked:
        return {"text": text}
    before, answer = SENTINEL.split(inputs)[0], without_sentinels(target)
    return {"text": text, "prompt": before, "completion": text[len(before) :], "span": answer}


if __name__ == "__main__":
    main(
        {
            "forward_inf": forward_inf,
            "forward_inf_one": forward_inf_one,
            "tuned": tuned,
            "gradient": partial(forward_inf, ascent=AscentConfig(direction="gradient")),
            **{name: partial(baseline, name) for name in BASELINES},
        }
    )
