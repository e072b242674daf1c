"""Removing the best candidates of a drawing and training again: how much its loss rises."""

from collections.abc import Callable, Mapping

import numpy as np
from datasets import Dataset

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.scores.intervals import with_interval
from hf_forward_inf.utils.models import evaluating
from hf_forward_inf.utils.processes import say

Train = Callable[[Dataset, int], DiffusionAdapter]
"""Trains a model from random weights on some pictures, given a seed."""
TIMES = 64
"""Timesteps of the loss of a drawing: more than for tracing, since two trainings are compared."""


def removal_rises(
    train: Train, found: Mapping[str, Attribution], queries: Dataset, rows: Dataset, count: int, seed: int
) -> dict[str, np.ndarray]:
    """Train again without each query's best candidates, and return how much its loss rises.

    The removed pictures are replaced by random others, so that training has as many pictures, in the same order and
    with the same noise, and differs in nothing else from training on all of them.

    Args:
        train (`Callable`): Trains a model; see [`Train`].
        found (`dict[str, Attribution]`): Attributions over all rows by method, whose first queries are `queries`.
        queries (`datasets.Dataset`): Drawings to explain.
        rows (`datasets.Dataset`): All pictures.
        count (`int`): Number of candidates to remove.
        seed (`int`): Seed of every training.

    Returns:
        `dict[str, np.ndarray]`: By method, (loss without them - loss with all) / loss with all, `[queries]`.
    """
    whole = _losses(train(rows, seed), queries)
    rises: dict[str, np.ndarray] = {}
    for name, attribution in found.items():
        after = [
            _losses(train(rows.select(without(attribution.ranking(i)[:count], len(rows), i)), seed), queries)[i]
            for i in range(len(queries))
        ]
        rises[name] = np.array(after) / whole - 1
        say(f"Without the {count} best of {name}, losses of drawings rise by {rises[name].mean():.1%}.")
    return rises


def without(left_out: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Return row numbers `[rows]` in which some rows are replaced by random others."""
    places = np.arange(rows)
    kept = np.delete(places, left_out)
    places[left_out] = np.random.default_rng(seed).choice(kept, len(left_out))
    return places


def as_figures(rises: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Return mean rises with bootstrap intervals, and the share of queries whose rise exceeds that of random."""
    figures = {}
    for name, values in rises.items():
        figures[name] = with_interval("rise", values)
        if name != "random":
            figures[name]["above_random"] = float((values > rises["random"]).mean())
    return figures


def _losses(adapter: DiffusionAdapter, queries: Dataset) -> np.ndarray:
    """Return the losses of drawings at [`TIMES`] timesteps, float64 `[queries]`."""
    finer = DiffusionAdapter(adapter.pipe, timesteps=TIMES, seed=adapter.seed)
    with evaluating(finer.model):
        return LossPass(finer, queries).base().astype(np.float64)
