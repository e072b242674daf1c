"""Attributors made of attributors: fused rankings, mean scores, a cheap one that preselects for an expensive one."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from hf_forward_inf.attribution import Attribution, Attributor
from hf_forward_inf.baselines.base import Baseline
from hf_forward_inf.scores.metrics import mean_ranks
from hf_forward_inf.tracing.time_budget import slices


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
    """The mean score of several attributors: one method on several models of one training, by checkpoint or seed.

    What the scores of several models share comes from the data; the rest is an accident of the seed.

    Args:
        attributors (`list[Attributor]`): Attributors to average.
        standardise (`bool`, defaults to `False`): Whether to divide each attributor's scores for a query by their
            standard deviation first: for attributors with different units, or models that should have equal weight.

    Raises:
        ValueError: If there are no attributors.

    Example:
        >>> Ensemble([ForwardInf(model, tokenizer) for model in models]).trace(queries, candidates)
    """

    def __init__(self, attributors: Sequence[Attributor], standardise: bool = False):
        if not attributors:
            raise ValueError("Ensemble needs at least one attributor.")
        self.attributors, self.standardise = list(attributors), standardise
        self.name = f"mean({', '.join(dict.fromkeys(one.name for one in attributors))})"

    @property
    def config(self) -> dict[str, Any]:
        """Whether scores are standardised, and the averaged attributors with their options."""
        return {"standardise": self.standardise, "attributors": [described(one) for one in self.attributors]}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Return mean scores, `[queries, candidates]`, NaN where any attributor has no score."""
        scores = np.zeros((len(queries), len(candidates)), dtype=np.float32)
        for one in self.attributors:
            found = one.trace(queries, candidates).dense()
            if self.standardise:
                spread = np.nanstd(found, axis=1, keepdims=True)
                found = found / np.where(spread > 0, spread, 1)
            scores += found / len(self.attributors)
        return scores


class Cascade(Baseline):
    """A cheap attributor ranks all candidates, an expensive one ranks the best of them again.

    Args:
        cheap (`Attributor`): Scores every candidate.
        expensive (`Attributor`): Scores the best `keep` candidates of each query and sees no others: give a
            [`ForwardInf`] whose direction is corrected by curvature its `training` data.
        keep (`int`, defaults to 200): Number of candidates that are ranked again.

    Raises:
        ValueError: If `keep` is below 1.

    Example:
        >>> Cascade(BM25(), ForwardInf(model, tokenizer, training=candidates)).trace(queries, candidates)
    """

    def __init__(self, cheap: Attributor, expensive: Attributor, keep: int = 200):
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1.")
        self.cheap, self.expensive, self.keep = cheap, expensive, keep
        self.name = f"{cheap.name}>{expensive.name}"

    @property
    def config(self) -> dict[str, Any]:
        """Both attributors with their options, and how many candidates are ranked again."""
        return {"cheap": described(self.cheap), "expensive": described(self.expensive), "keep": self.keep}

    def trace(
        self, queries: Dataset, candidates: Dataset, top_k: int | None = None, time_budget: float | None = None
    ) -> Attribution:
        """Rank in two stages, `[queries, candidates]`; scores are 1 / rank, and have no unit.

        Candidates that the expensive attributor did not score keep the cheap one's order, after those that it scored.

        Args:
            queries (`datasets.Dataset`): Queries.
            candidates (`datasets.Dataset`): Candidates.
            top_k (`int`, *optional*): Number of best candidates returned for each query. Defaults to all.
            time_budget (`float`, *optional*): Seconds for the second stage, an equal share for each query: candidates
                are scored best first, regardless of `keep`, until the time is up.
        """
        if time_budget is None:
            return super().trace(queries, candidates, top_k)
        scores, config = self._ranked(queries, candidates, time_budget), {**self.config, "time_budget": time_budget}
        return Attribution(scores, queries, candidates, method=self.name, config=config).keep(top_k)

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Return 1 / rank, `[queries, candidates]`."""
        return self._ranked(queries, candidates, None)

    def _ranked(self, queries: Dataset, candidates: Dataset, time_budget: float | None) -> np.ndarray:
        scores = np.empty((len(queries), len(candidates)), dtype=np.float32)
        first = self.cheap.trace(queries, candidates)
        start = time.perf_counter()
        for i in range(len(queries)):
            order = first.ranking(i)
            if time_budget is None:
                parts = iter([np.sort(order[: self.keep])])  # in row order, so that ties are broken as everywhere
            else:
                left = max(time_budget - (time.perf_counter() - start), 1e-9)
                parts = slices(order, left / (len(queries) - i))
            final = self._ranked_again(queries.select([i]), candidates, order, parts)
            scores[i, final] = 1 / np.arange(1, len(final) + 1)
        return scores

    def _ranked_again(
        self, query: Dataset, candidates: Dataset, order: np.ndarray, parts: Iterator[np.ndarray]
    ) -> np.ndarray:
        """Return row numbers, best first: those in `parts` by the expensive attributor, then the rest in `order`."""
        seen = np.full(len(candidates), np.nan, dtype=np.float32)
        for rows in parts:
            seen[rows] = self.expensive.trace(query, candidates.select(rows)).dense()[0]
        found = np.flatnonzero(~np.isnan(seen))
        best = found[np.argsort(-seen[found], kind="stable")]
        return np.concatenate([best, order[np.isnan(seen[order])]])


def described(attributor: Attributor) -> dict[str, Any]:
    """Return an attributor's name and options, for the configuration of what is made of it."""
    return {"method": attributor.name, **attributor.config}


def ranks(found: Attribution) -> np.ndarray:
    """Return every candidate's rank, `[queries, candidates]`: from 1, equal scores share their mean rank."""
    return np.stack([mean_ranks(np.nan_to_num(row, nan=-np.inf)) for row in found.scores])
