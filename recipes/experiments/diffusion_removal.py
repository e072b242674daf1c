"""Does it matter? Without a drawing's best candidates the model is trained again, and draws it less readily."""

from collections.abc import Callable, Mapping

import numpy as np
from datasets import Dataset

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.scores.metrics import bootstrap_interval
from hf_forward_inf.utils.models import evaluating
from hf_forward_inf.utils.processes import say

Train = Callable[[Dataset, int], DiffusionAdapter]
"""Trains a model from the start on some pictures, given a seed."""
TIMES = 64
"""At which the loss of a drawing is taken: more than for tracing, since two trainings are compared."""


def removal_rises(
    train: Train, found: Mapping[str, Attribution], queries: Dataset, rows: Dataset, count: int, seed: int
) -> dict[str, np.ndarray]:
    """Train again without each query's best candidates, and see how much its loss rises.

    Other pictures, drawn at random, take the places of those that are left out: a training sees as many, in the same
    order and with the same noise, and differs from that on everything in nothing else.

    Args:
        train (`Callable`): Trains; see [`Train`].
        found (`dict[str, Attribution]`): Rankings of all rows, by method, for these queries first.
        queries (`datasets.Dataset`): Drawings.
        rows (`datasets.Dataset`): All pictures.
        count (`int`): Best candidates left out.
        seed (`int`): Of every training.

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
    """Put others, drawn at random, in the places of some of the rows: row numbers, `[rows]`."""
    places = np.arange(rows)
    kept = np.delete(places, left_out)
    places[left_out] = np.random.default_rng(seed).choice(kept, len(left_out))
    return places


def as_figures(rises: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Give means over queries with bootstrap intervals, and in how many queries a method's rise is above chance's."""
    figures = {}
    for name, values in rises.items():
        low, high = bootstrap_interval(values)
        figures[name] = {"rise": float(values.mean()), "rise_low": low, "rise_high": high}
        if name != "random":
            figures[name]["above_random"] = float((values > rises["random"]).mean())
    return figures


def _losses(adapter: DiffusionAdapter, queries: Dataset) -> np.ndarray:
    """Losses of drawings, at many times."""
    finer = DiffusionAdapter(adapter.pipe, timesteps=TIMES, seed=adapter.seed)
    with evaluating(finer.model):
        return LossPass(finer, queries).base().astype(np.float64)
