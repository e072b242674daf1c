"""Losses of queries after training on random halves of the data, by a function of the user's."""

import copy
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from datasets import Dataset
from torch import nn

from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.scores.retraining import Retrained, random_subsets, retrained_outcomes
from hf_forward_inf.utils.callables import fingerprint_of_callable
from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model, uncached
from hf_forward_inf.utils.models import evaluating
from hf_forward_inf.utils.processes import say

TrainModel: TypeAlias = Callable[[nn.Module, Dataset, int], nn.Module | None]
"""Trains a model on some rows for some epochs: in place, or another one, which is returned."""
TRAINING_PASSES = 3
"""Forward passes that a pass of training costs, about."""


def retrained_on_halves(
    attributor: Scorer,
    queries: Dataset,
    candidates: Dataset,
    train: TrainModel,
    halves: int,
    epochs: int,
    seed: int,
    settings: int,
) -> Retrained:
    """Train on random halves of the candidates, and return the losses of the queries; see [`tuning.tune`].

    The losses of each half are cached as soon as they are known, under a fingerprint of the model, the rows and the
    code of `train`. The model itself is never trained, only copies of it.

    Raises:
        ValueError: If there are fewer than 2 halves, or a query's loss is not finite.
    """
    if halves < 2 or epochs < 1:
        raise ValueError(f"halves={halves} must be at least 2, and epochs={epochs} at least 1.")
    adapter = attributor.adapter
    say(
        f"Choosing among {settings} settings by retraining: {halves} halves of {len(candidates) // 2:,} candidates x "
        f"{epochs} epochs, about {TRAINING_PASSES * halves * epochs / 2:g} forward passes over all candidates, less "
        f"what is cached; then each setting traces {len(queries)} queries."
    )
    subsets = random_subsets(len(candidates), halves, seed=seed)

    def losses(subsets: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        model = copy.deepcopy(adapter.model)
        trained = train(model, candidates.select(np.flatnonzero(subsets[0])), epochs)
        return _losses(attributor, model if trained is None else trained, queries)

    parts = [one._fingerprint for one in (queries, candidates)]
    key = fingerprint(
        fingerprint_of_model(adapter.model), adapter.cache_key, parts, fingerprint_of_callable(train), epochs
    )
    found = retrained_outcomes(losses, subsets, key=key, together=1, cache_dir=attributor.cache_dir)[0]
    if not np.isfinite(found).all():
        half, query = np.argwhere(~np.isfinite(found))[0]
        raise ValueError(f"Query {query} has no finite loss after training on half {half}: does train diverge?")
    return Retrained(queries, subsets, found)


def _losses(attributor: Scorer, model: nn.Module, queries: Dataset) -> np.ndarray:
    """Return the losses of the queries under another model, `[1, queries]`."""
    other = attributor.adapter.with_model(model)
    with evaluating(other.model), uncached():
        return LossPass(other, queries, max_batch_length=attributor.max_batch_length).base()[None]
