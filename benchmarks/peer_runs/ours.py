"""This library: Forward-INF and its baselines. Its cache is what it stores between runs."""

from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines import FirstOrder, attributors_for
from hf_forward_inf.utils.processes import progress_bars
from peer_runs.measure import main
from peer_runs.task import Task

REGISTERED = (
    "forward_inf", "forward_inf_gradient", "first_order", "tracin", "tracin_cosine", "trackstar",
    "influence_functions", "influence_functions_cosine", "representation", "bm25",
)  # fmt: skip


def registered(name: str, task: Task, modules: str | None = None, mode: Any = None, **options: Any) -> np.ndarray:
    """Trace with an attributor of the registry, and options of the tracer, or of its ascent, that it is made for."""
    step: dict[str, Any] = {"modules": None if modules is None else [modules], "mode": mode}
    ascent = AscentConfig(**{name: value for name, value in step.items() if value is not None})
    tracer = ForwardInf(task.model, AutoTokenizer.from_pretrained(task.folder / "model"), ascent=ascent, **options)
    return traced(attributors_for(tracer, [name])[name], task)


def influence(task: Task, direction: Any) -> np.ndarray:
    """Return influence functions with an inverse curvature that is a direction of the ascent."""
    tracer = ForwardInf(task.model, AutoTokenizer.from_pretrained(task.folder / "model"))
    return traced(FirstOrder(adapter=tracer.adapter, ascent=AscentConfig(direction=direction)), task)


def traced(attributor: Attributor, task: Task) -> np.ndarray:
    queries, candidates = (Dataset.from_list([row["row"] for row in rows]) for rows in (task.queries, task.candidates))
    with progress_bars(False):
        return attributor.trace(queries, candidates).scores


if __name__ == "__main__":
    main({**{name: partial(registered, name) for name in REGISTERED}, "influence": influence})
