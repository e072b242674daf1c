"""Attributors made of attributors: fused rankings, mean scores, differences of scores."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from hf_forward_inf.attribution import Attribution, Attributor
from hf_forward_inf.baselines.base import Baseline
from hf_forward_inf.data.inputs import Given
from hf_forward_inf.scores.metrics import mean_ranks
from hf_forward_inf.utils.fingerprints import fingerprint_of_model


class Fusion(Baseline):
    """Reciprocal rank fusion (Cormack et al., 2009): the sum over attributors of 1 / (k + rank).

    Args:
        attributors (`list[Attributor]`): Attributors to fuse.
        k (`int`, defaults to 60): The larger, the less the first ranks weigh against the following ones.

    Raises:
        ValueError: If there are no attributors.

    Example:
        >>> Fusion([BM25(), ForwardInf(model, tokenizer)]).trace(queries, candidates)
    """

    def __init__(self, attributors: Sequence[Attributor], k: int = 60):
        if not attributors:
            raise ValueError("Fusion needs at least one attributor.")
        self.attributors, self.k = list(attributors), k
        self.name = "+".join(one.name for one in attributors)

    @property
    def config(self) -> dict[str, Any]:
        """The constant, and the fused attributors with their options."""
        return {"k": self.k, "attributors": [described(one) for one in self.attributors]}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Return the sum of reciprocal ranks, `[queries, candidates]`, without a unit."""
        scores = np.zeros((len(queries), len(candidates)), dtype=np.float32)
        for one in self.attributors:
            scores += 1 / (self.k + ranks(one.trace(queries, candidates)))
        return scores


class Ensemble(Baseline):
    """The mean score of several attributors: one method on several models, or several methods on one.

    What the scores of several models of one training share, by checkpoint or seed, comes from the data; the rest is an
    accident of the seed. On image classifiers the rise of the loss predicts best what retraining does, and that of the
    margin finds shortcuts and subclasses: losses with a quarter of margins, after the same steps, have an LDS of .771
    on the digits, where losses have .778 and margins .461, and quanda's metrics of shortcuts and subclasses are .361
    and .668, where losses have .127 and .644.

    Args:
        attributors (`list[Attributor]`): Attributors to average.
        standardise (`bool`, defaults to `False`): Whether to divide each attributor's scores for a query by their
            standard deviation first: for attributors with different units, or models that should have equal weight.
        weights (`list[float]`, *optional*): The weight of each attributor. Defaults to equal ones.

    Raises:
        ValueError: If there are no attributors, or not as many weights, or their sum is not above 0.

    Example:
        >>> Ensemble([ForwardInf(model, tokenizer) for model in models]).trace(queries, candidates)
        >>> losses, margins = ImageClassificationAdapter(model), ImageClassificationAdapter(model, objective="margin")
        >>> step = ForwardInf(adapter=losses).ascent  # the same for both
        >>> both = [ForwardInf(adapter=losses), ForwardInf(adapter=margins, ascent=step)]
        >>> Ensemble(both, standardise=True, weights=[1, 0.25]).trace(queries, candidates)
    """

    def __init__(
        self, attributors: Sequence[Attributor], standardise: bool = False, weights: Sequence[float] | None = None
    ):
        if not attributors:
            raise ValueError("Ensemble needs at least one attributor.")
        weights = [1.0] * len(attributors) if weights is None else list(weights)
        if len(weights) != len(attributors) or not 0 < sum(weights) < math.inf:
            raise ValueError(
                f"weights={weights} must be one number for each of the {len(attributors)} attributors, with a sum "
                "above 0."
            )
        self.attributors, self.standardise = list(attributors), standardise
        self.weights = [weight / sum(weights) for weight in weights]
        self.name = f"mean({', '.join(dict.fromkeys(one.name for one in attributors))})"

    @property
    def config(self) -> dict[str, Any]:
        """Whether scores are standardised, the weights, and the averaged attributors with their options."""
        own = {"standardise": self.standardise, "weights": self.weights}
        return {**own, "attributors": [described(one) for one in self.attributors]}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Return mean scores, `[queries, candidates]`, NaN where any attributor has no score."""
        scores = np.zeros((len(queries), len(candidates)), dtype=np.float32)
        for one, weight in zip(self.attributors, self.weights, strict=True):
            found = one.trace(queries, candidates).dense()
            if self.standardise:
                spread = np.nanstd(found, axis=1, keepdims=True)
                found = found / np.where(spread > 0, spread, 1)
            scores += weight * found
        return scores


class Difference:
    """An attributor's scores minus those of a baseline: the same method on another model, typically the base model.

    A pretrained model that knew an answer before it was fine-tuned has candidates whose loss rises, too. What is left
    is what the fine-tuning changed. It is no better account of what caused an answer: a base model scores high what
    would teach it, and without that, retraining is predicted much worse (`recipes/sensitivity.py`). Each model takes
    its own step, and its scores are in its own units. Where the attributor screens its candidates, or sets a floor,
    the baseline scores those candidates that have scores of their own; all others get the lowest difference.

    Args:
        attributor (`Attributor`): Traces the model.
        baseline (`Attributor`): Traces the other model. A [`ForwardInf`] scores only what it has to.

    Raises:
        ValueError: If both don't read rows in the same way: another tokenizer, other columns, another maximum length.

    Example:
        >>> both = Difference(ForwardInf(model, tokenizer), ForwardInf(base_model, tokenizer))
        >>> found = both.trace(queries, candidates)
    """

    def __init__(self, attributor: Attributor, baseline: Attributor):
        adapters = [one.adapter for one in (attributor, baseline) if hasattr(one, "adapter")]
        if len({one.cache_key for one in adapters}) > 1:
            raise ValueError(
                "The model and its baseline don't read rows in the same way: give both the same tokenizer or "
                "processor, columns and maximum length."
            )
        self.attributor, self.baseline = attributor, baseline
        self.name = f"{attributor.name}_less_baseline"

    @property
    def config(self) -> dict[str, Any]:
        """Both attributors with their options, and a fingerprint of the baseline's model."""
        adapter = getattr(self.baseline, "adapter", None)
        model = {} if adapter is None else {"model": fingerprint_of_model(adapter.model)}
        return {"attributor": described(self.attributor), "baseline": {**described(self.baseline), **model}}

    def trace(self, queries: Given, candidates: Given, top_k: int | None = None) -> Attribution:
        """Score candidates for every query by both, and subtract; arguments as in [`Baseline.trace`].

        Raises:
            ValueError: If the baseline leaves out candidates that the attributor has scored.
        """
        found = self.attributor.trace(queries, candidates)
        own = np.ones(found.scores.shape, dtype=bool) if found.stage is None else found.stage
        found = replace(found, stage=own)
        other = _restricted(self.baseline, found).trace(found.queries, found.candidates)
        computed = own & np.isfinite(found.scores)
        if other.stage is not None and not other.stage[computed].all():
            raise ValueError(
                f"The baseline {other.method} has no scores for some candidates: give it strategy='full', and no keep."
            )
        scores = np.where(computed, found.scores - other.scores, np.nan)
        with np.errstate(invalid="ignore"):
            floor = np.fmin.reduce(scores, axis=1, keepdims=True)
        scores = np.where(own, scores, floor).astype(np.float32)
        scores[np.isnan(found.scores)] = np.nan
        stage = None if own.all() else own
        found = replace(found, scores=scores, stage=stage, method=self.name, config=self.config, backgrounds=None)
        return found.keep(top_k)


class _Ranked(Baseline):
    """Ranks candidates as an attribution did that has scores for some of them."""

    name = "ranked"

    def __init__(self, found: Attribution):
        self.found = found

    @property
    def config(self) -> dict[str, Any]:
        return {"method": self.found.method}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        assert self.found.stage is not None
        return np.where(self.found.stage, self.found.scores, -np.inf)


def _restricted(baseline: Attributor, found: Attribution) -> Attributor:
    """Return what scores the candidates that have scores of their own: all, or as a screen keeps them."""
    if not hasattr(baseline, "with_options"):
        return baseline
    assert found.stage is not None
    keep = int(found.stage.sum(axis=1).max())
    if keep == found.stage.shape[1]:
        return baseline.with_options(strategy="full", screen=None, keep=None)
    return baseline.with_options(strategy="screen", screen=_Ranked(found), keep=keep, audit=0)


def described(attributor: Attributor) -> dict[str, Any]:
    """Return an attributor's name and options, for the configuration of what is made of it."""
    return {"method": attributor.name, **attributor.config}


def ranks(found: Attribution) -> np.ndarray:
    """Return every candidate's rank, `[queries, candidates]`: from 1, equal scores share their mean rank."""
    return np.stack([mean_ranks(np.nan_to_num(row, nan=-np.inf)) for row in found.scores])
