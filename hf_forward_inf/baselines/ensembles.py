"""Attributors made of attributors: their rankings fused, or a cheap one choosing what a expensive one scores."""

import time
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from hf_forward_inf.attribution import Attribution, Attributor
from hf_forward_inf.scores.metrics import mean_ranks
from hf_forward_inf.tracing.time_budget import slices


class Fusion:
    """Reciprocal rank fusion (Cormack et al., 2009): the sum over attributors of 1 / (k + rank).

    Args:
        attributors (`list`): Anything with `trace(queries, candidates) -> Attribution`.
        k (`int`, defaults to 60): The larger, the less the first ranks count beside the next.

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

    def trace(self, queries: Dataset, candidates: Dataset, top_k: int | None = None) -> Attribution:
        """Fuse the rankings, `[queries, candidates]`; scores have no unit."""
        scores = np.zeros((len(queries), len(candidates)), dtype=np.float32)
        for one in self.attributors:
            scores += 1 / (self.k + ranks(one.trace(queries, candidates)))
        config = {"k": self.k, "attributors": [one.name for one in self.attributors]}
        return Attribution(scores, queries, candidates, method=self.name, config=config).keep(top_k)


class Ensemble:
    """The mean of several attributors' scores: one method on several models of one training, by checkpoint or seed.

    What the scores of two models have in common is the data's; the rest is the accident of a seed.

    Args:
        attributors (`list`): Anything with `trace(queries, candidates) -> Attribution`.
        standardise (`bool`, defaults to `False`): Divide each attributor's scores of a query by their standard
            deviation first: for attributors whose scores have different units, or models that count differently.

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

    def trace(self, queries: Dataset, candidates: Dataset, top_k: int | None = None) -> Attribution:
        """Average the scores, `[queries, candidates]`; a pair that one of them gives no score has none."""
        scores = np.zeros((len(queries), len(candidates)), dtype=np.float32)
        for one in self.attributors:
            found = one.trace(queries, candidates).dense()
            if self.standardise:
                spread = np.nanstd(found, axis=1, keepdims=True)
                found = found / np.where(spread > 0, spread, 1)
            scores += found / len(self.attributors)
        config = {"standardise": self.standardise, "attributors": [one.name for one in self.attributors]}
        return Attribution(scores, queries, candidates, method=self.name, config=config).keep(top_k)


class Cascade:
    """A cheap attributor ranks everything, a expensive one ranks again the best of that.

    Args:
        cheap (attributor): Scores every candidate.
        expensive (attributor): Scores each query's best `keep` candidates, which is all that it sees: give a
            `ForwardInf` whose direction is corrected by curvature its `training` data.
        keep (`int`, defaults to 200): How many.

    Raises:
        ValueError: If `keep` is below 1.

    Example:
        >>> Cascade(BM25(), ForwardInf(model, tokenizer)).trace(queries, candidates)
    """

    def __init__(self, cheap: Attributor, expensive: Attributor, keep: int = 200):
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1.")
        self.cheap, self.expensive, self.keep = cheap, expensive, keep
        self.name = f"{cheap.name}>{expensive.name}"

    def trace(
        self, queries: Dataset, candidates: Dataset, top_k: int | None = None, time_budget: float | None = None
    ) -> Attribution:
        """Rank in two stages, `[queries, candidates]`; scores are 1 / rank, and have no unit.

        Candidates that the expensive attributor did not see keep the cheap one's order, after those that it saw.

        Args:
            queries (`datasets.Dataset`): Queries.
            candidates (`datasets.Dataset`): Candidates.
            top_k (`int`, *optional*): Keep only the best candidates of each query.
            time_budget (`float`, *optional*): Seconds that the second stage may take, an equal share for each query:
                it goes through the candidates best first, however many `keep` says, until its time is up.
        """
        scores = np.empty((len(queries), len(candidates)), dtype=np.float32)
        first = self.cheap.trace(queries, candidates)
        start = time.perf_counter()
        for i in range(len(queries)):
            order = first.ranking(i)
            if time_budget is None:
                parts = iter(
                    [np.sort(order[: self.keep])]
                )  # in the rows' order, so that ties are broken as everywhere
            else:
                left = max(time_budget - (time.perf_counter() - start), 1e-9)
                parts = slices(order, left / (len(queries) - i))
            seen = np.full(len(candidates), np.nan, dtype=np.float32)
            for rows in parts:
                seen[rows] = self.expensive.trace(queries.select([i]), candidates.select(rows)).dense()[0]
            found = np.flatnonzero(~np.isnan(seen))
            best = found[np.argsort(-seen[found], kind="stable")]
            final = np.concatenate([best, order[np.isnan(seen[order])]])
            scores[i, final] = 1 / np.arange(1, len(final) + 1)
        config = {
            "cheap": self.cheap.name,
            "expensive": self.expensive.name,
            "keep": self.keep,
            "time_budget": time_budget,
        }
        return Attribution(scores, queries, candidates, method=self.name, config=config).keep(top_k)


def ranks(found: Attribution) -> np.ndarray:
    """Give every candidate's rank, from 1, equal scores sharing their mean: `[queries, candidates]`."""
    return np.stack([mean_ranks(np.nan_to_num(row, nan=-np.inf)) for row in found.scores])
