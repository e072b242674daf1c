"""Retraining on subsets of the data: the ground truth that attributions are evaluated with, and how well it is met."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from hf_forward_inf.scores.intervals import standard_error, with_interval
from hf_forward_inf.scores.metrics import best_first, spearman
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.storage import cached_tensors, default_cache_dir

Train: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Trains a model on each subset of the candidates, booleans `[models, candidates]`, with a seed for each model, and
returns outcomes for the queries: their losses, float32 `[models, queries]`, or several values for each."""


@dataclass(frozen=True)
class Retrained:
    """Losses of some queries after training on subsets of the candidates.

    Args:
        queries (`datasets.Dataset`): The queries.
        subsets (`np.ndarray`): Booleans, `[subsets, candidates]`: which candidates are in each subset.
        losses (`np.ndarray`): Losses, `[subsets, queries]`, preferably averaged over several training seeds.

    Raises:
        ValueError: If the shapes don't match.
    """

    queries: Dataset
    subsets: np.ndarray
    losses: np.ndarray

    def __post_init__(self) -> None:
        if self.losses.shape != (len(self.subsets), len(self.queries)):
            raise ValueError(
                f"losses have shape {self.losses.shape}, but {len(self.subsets)} subsets and {len(self.queries)} "
                f"queries need {(len(self.subsets), len(self.queries))}."
            )


def random_subsets(candidates: int, subsets: int, drop: float = 0.5, seed: int = 0) -> np.ndarray:
    """Draw subsets of the candidates, all of the same size, booleans `[subsets, candidates]`.

    Args:
        candidates (`int`): Number of candidates.
        subsets (`int`): Number of subsets.
        drop (`float`, defaults to 0.5): Share of the candidates that a subset lacks, above 0 and below 1.
        seed (`int`, defaults to 0): Seed of the draw.

    Raises:
        ValueError: If nothing would be dropped, or everything.
    """
    kept = candidates - round(drop * candidates)
    if not 0 < kept < candidates:
        raise ValueError(f"drop={drop} leaves {kept} of {candidates} candidates: give a share that leaves some out.")
    draw = np.random.default_rng(seed)
    return np.stack([draw.permutation(candidates) < kept for _ in range(subsets)])


def all_but_one(candidates: int, rows: Iterable[int]) -> np.ndarray:
    """Return subsets that lack one candidate each, booleans `[rows, candidates]`.

    The [`lds`] on them is the leave-one-out correlation: the Spearman correlation of the rows' scores and of
    how much a query's loss rises without them.

    Args:
        candidates (`int`): Number of candidates.
        rows (`Iterable[int]`): The candidates that are left out.
    """
    rows = list(rows)
    subsets = np.ones((len(rows), candidates), dtype=bool)
    subsets[np.arange(len(rows)), rows] = False
    return subsets


def without_best(scores: np.ndarray, count: int) -> np.ndarray:
    """Return for each query all candidates but those that score highest, booleans `[queries, candidates]`.

    Args:
        scores (`np.ndarray`): Scores, `[queries, candidates]`; equal scores rank in row order, NaN last.
        count (`int`): Number of candidates that are left out.
    """
    kept = np.ones(scores.shape, dtype=bool)
    np.put_along_axis(kept, best_first(scores)[:, :count], False, axis=1)
    return kept


def rises_without_best(trained: Callable[[np.ndarray], np.ndarray], scores: np.ndarray, count: int) -> np.ndarray:
    """Return how much each query's loss rises if its best candidates are removed and a model is trained again (QLD).

    Every query needs a training of its own, and all of them one with all candidates.

    Args:
        trained (`Callable`): Trains on subsets, booleans `[subsets, candidates]`, and returns the queries' losses,
            `[subsets, queries]`.
        scores (`np.ndarray`): Scores, `[queries, candidates]`.
        count (`int`): Number of candidates that are removed for a query.

    Returns:
        `np.ndarray`: Rises of the loss, `[queries]`.
    """
    own = np.arange(len(scores))
    whole = trained(np.ones((1, scores.shape[1]), dtype=bool))[0]
    return trained(without_best(scores, count))[own, own] - whole


def retrained_outcomes(
    train: Train,
    subsets: np.ndarray,
    *,
    key: str,
    seeds: int = 1,
    together: int = 40,
    cache_dir: Path | None = None,
) -> np.ndarray:
    """Train a model on every subset with every seed, and return the outcomes for the queries.

    Outcomes are cached each time `together` models are trained, so that an interrupted run resumes.

    Args:
        train (`Callable`): Trains some models, on subsets of equal size.
        subsets (`np.ndarray`): Booleans, `[subsets, candidates]`.
        key (`str`): Identifies everything that `train` depends on: data, network, settings, queries.
        seeds (`int`, defaults to 1): Number of trainings on each subset.
        together (`int`, defaults to 40): Number of models that are trained at once.
        cache_dir (`Path`, *optional*): Outcomes are cached in its folder `retraining`. Defaults to
            [`storage.default_cache_dir`].

    Returns:
        `np.ndarray`: float32 `[seeds, subsets, queries, ...]`, with the further axes that `train` returns, if any.
    """
    folder = (cache_dir or default_cache_dir()) / "retraining"
    pairs = [(seed, subset) for seed in range(seeds) for subset in range(len(subsets))]
    parts = []
    bar = tqdm(total=len(pairs), desc="retraining", unit="model", disable=not process_state().is_main_process)
    for start in range(0, len(pairs), together):
        own_seeds, own = (np.array(one) for one in zip(*pairs[start : start + together], strict=True))
        name = fingerprint(key, own_seeds.tolist(), np.packbits(subsets[own]).tolist(), subsets.shape[1])

        def train_some(own: np.ndarray = own, own_seeds: np.ndarray = own_seeds) -> dict[str, Tensor]:
            return {"outcomes": torch.from_numpy(train(subsets[own], own_seeds))}

        with process_state().main_process_first():
            parts.append(cached_tensors(folder / f"{name}.safetensors", train_some)["outcomes"].numpy())
        bar.update(len(own))
    bar.close()
    found = np.concatenate(parts)
    return found.reshape(seeds, len(subsets), *found.shape[1:])


def lds(
    scores: np.ndarray, subsets: np.ndarray, losses: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Return the linear datamodeling score (Park et al., 2023): how well scores predict retraining on subsets.

    A model is trained from scratch on each subset S of the candidates; `losses` has its loss on each query q. The
    scores predict it as g(S) = sum over i in S of scores[q, i]. A proponent lowers the loss, so that

        lds(q) = Spearman correlation over S of g(S) and -loss(S, q)

    and the score is the mean over queries: 1 at best, 0 for uninformative scores. Only the ranks of the sums matter:
    for subsets of equal size, neither the scores' unit nor a constant added to all scores of a query changes it.

    Args:
        scores (`np.ndarray`): Scores, `[queries, candidates]`; NaN counts as 0.
        subsets (`np.ndarray`): Booleans, `[subsets, candidates]`: which candidates are in each subset.
        losses (`np.ndarray`): Losses, `[subsets, queries]`, preferably averaged over several training seeds.
        resamples (`int`, defaults to 1000): Number of bootstrap resamples of the queries for the interval.
        seed (`int`, defaults to 0): Seed of the resamples.

    Returns:
        `dict[str, float]`: `lds`, its standard error over queries `lds_se`, and 95% bootstrap interval `lds_low`,
        `lds_high`.

    Raises:
        ValueError: If the shapes don't match, or there are fewer than 2 subsets.

    Example:
        >>> scores = np.array([[3.0, 1.0, 0.0]])  # the first candidate helps the query most
        >>> subsets = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
        >>> lds(scores, subsets, losses=np.array([[0.1], [0.4], [0.9]]))["lds"]
        1.0
    """
    by_query = lds_by_query(scores, subsets, losses)
    return with_interval("lds", by_query, resamples=resamples, seed=seed) | {"lds_se": standard_error(by_query)}


def lds_by_query(scores: np.ndarray, subsets: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return each query's [`lds`], `[queries]`."""
    if losses.shape != (len(subsets), len(scores)) or subsets.shape[1:] != scores.shape[1:] or len(subsets) < 2:
        raise ValueError(
            f"scores {scores.shape}, subsets {subsets.shape} and losses {losses.shape} don't match: give [queries, "
            "candidates], [subsets, candidates] and [subsets, queries], with at least 2 subsets."
        )
    predicted = np.nan_to_num(scores.astype(np.float64), nan=0.0) @ subsets.T.astype(np.float64)
    return np.array([spearman(g, -loss) for g, loss in zip(predicted, losses.T, strict=True)])


def agreement(losses: np.ndarray) -> float:
    """Return how far trainings with different seeds agree: what no score can be expected to exceed by much.

    Args:
        losses (`np.ndarray`): Losses, `[seeds, subsets, queries]`.

    Returns:
        `float`: The Spearman correlation over subsets of two seeds' losses, mean over queries and pairs of seeds; NaN
        if there is one seed.
    """
    pairs = combinations(losses, 2)
    found = [spearman(one, other) for a, b in pairs for one, other in zip(a.T, b.T, strict=True)]
    return float(np.mean(found)) if found else math.nan
