"""Metrics of a ranking against known proponents, as FTRACE defines them (Akyürek et al., 2022).

Ties never help: candidates with equal scores have no order, and each metric is its expectation over all orders of
them, which no library of rankings computes. Candidates without a score (NaN) share the last rank.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_forward_inf.scores.intervals import standard_error, with_interval

KS = (1, 3, 5, 10, 25)
"""The cut-offs that FTRACE reports."""


def reciprocal_rank(scores: np.ndarray, proponents: Sequence[int]) -> float:
    """Return 1 / rank of the first proponent; 0 if there is none or none has a score.

    The expected rank of the first proponent, counted from 1, is `above + (tied + 1) / (r + 1)`: `above` candidates
    score higher than the best proponent, and `tied` candidates, of which `r` are proponents, score the same (the best
    proponent included).

    Args:
        scores (`np.ndarray`): Scores, `[candidates]`.
        proponents (`Sequence[int]`): Row numbers of the proponents.

    Example:

        >>> reciprocal_rank(np.array([0.1, 0.9, 0.5]), [2])  # one candidate above it
        0.5
    """
    rows = np.asarray(proponents, dtype=int)
    known = rows[~np.isnan(scores[rows])] if len(rows) else rows
    if len(known) == 0:
        return 0.0
    best = scores[known].max()
    above = np.sum(scores > best)
    tied = np.sum(scores == best)
    r = np.sum(scores[known] == best)
    return float(1 / (above + (tied + 1) / (r + 1)))


def hits_at_k(scores: np.ndarray, proponents: Sequence[int], k: int) -> float:
    """Return the number of proponents among the best k, in expectation over ties.

    A group of `tied` candidates, `r` of them proponents, with `above` candidates before it, adds
    `r x clip(k - above, 0, tied) / tied`. Candidates without a score never count.
    """
    hits = 0.0
    rows = np.asarray(proponents, dtype=int)
    relevant = scores[rows] if len(rows) else np.array([])
    for value in np.unique(relevant[~np.isnan(relevant)]):
        above = np.sum(scores > value)
        tied = np.sum(scores == value)
        hits += np.sum(relevant == value) * np.clip(k - above, 0, tied) / tied
    return float(hits)


def precision_at_k(scores: np.ndarray, proponents: Sequence[int], k: int) -> float:
    """Return the share of the best k candidates that are proponents: hits@k / k."""
    return hits_at_k(scores, proponents, k) / k


def recall_at_k(scores: np.ndarray, proponents: Sequence[int], k: int) -> float:
    """Return the share of proponents among the best k candidates: hits@k / number of proponents; 0 if none."""
    return hits_at_k(scores, proponents, k) / len(proponents) if len(proponents) else 0.0


def average_precision(scores: np.ndarray, proponents: Sequence[int]) -> float:
    """Return the mean over proponents of the precision at their rank, the area under the precision-recall curve.

    In expectation over ties: the proponents of a group of `tied` candidates, `r` of them proponents, with `above`
    candidates and `found` proponents before it, have on average at the j-th place of the group a precision of
    `(found + 1 + (j - 1) x (r - 1) / (tied - 1)) / (above + j)`. Candidates without a score share the last rank.

    Args:
        scores (`np.ndarray`): Scores, `[candidates]`.
        proponents (`Sequence[int]`): Row numbers of the proponents; 0 is returned if there are none.

    Example:
        >>> average_precision(np.array([0.9, 0.5, 0.1]), [0, 2])  # precision 1 at rank 1, and 2/3 at rank 3
        0.8333333333333333
    """
    known = np.nan_to_num(scores.astype(np.float64), nan=-np.inf)
    relevant = known[np.asarray(proponents, dtype=int)] if len(proponents) else np.array([])
    total = 0.0
    for value, r in zip(*np.unique(relevant, return_counts=True), strict=True):
        above, tied, found = np.sum(known > value), np.sum(known == value), np.sum(relevant > value)
        place = np.arange(1, tied + 1)
        earlier = (place - 1) * (r - 1) / max(tied - 1, 1)
        total += r * np.mean((found + 1 + earlier) / (above + place))
    return float(total / len(proponents)) if len(proponents) else 0.0


def random_reciprocal_rank(candidates: int, proponents: int) -> float:
    """Return the expected reciprocal rank in a random order: the sum over ranks j of P(first proponent at j) / j.

    With r proponents among N candidates, P(first at j) = P(none before j) x r / (N - j + 1), and
    P(none before j + 1) = P(none before j) x (N - j + 1 - r) / (N - j + 1).
    """
    expected, none_before = 0.0, 1.0
    for j in range(1, candidates - proponents + 2):
        left = candidates - j + 1
        expected += none_before * proponents / left / j
        none_before *= (left - proponents) / left
    return expected


def random_figures(candidates: int, proponents: Sequence[int], ks: Sequence[int] = KS) -> dict[str, float]:
    """Return the expected metrics of a random order, averaged over queries.

    Args:
        candidates (`int`): Number of candidates, N.
        proponents (`Sequence[int]`): Each query's number of proponents, r.
        ks (`Sequence[int]`, defaults to 1, 3, 5, 10 and 25): Cut-offs of precision and recall.

    Returns:
        `dict[str, float]`: `mrr` ([`random_reciprocal_rank`]), `precision@k` = mean of r / N, `recall@k` = k / N.
    """
    result = {"mrr": float(np.mean([random_reciprocal_rank(candidates, r) for r in proponents]))}
    for k in (k for k in ks if k <= candidates):
        result[f"precision@{k}"] = float(np.mean(proponents)) / candidates
        result[f"recall@{k}"] = k / candidates
    return result


def collapse(
    scores: np.ndarray, proponents: Sequence[Sequence[int]], groups: Sequence[object]
) -> tuple[np.ndarray, list[list[int]]]:
    """Return scores and proponents with equal candidates merged, each group with its highest score.

    Args:
        scores (`np.ndarray`): Scores, `[queries, candidates]`.
        proponents (`Sequence[Sequence[int]]`): For each query, row numbers of its proponents.
        groups (`Sequence`): A label for each candidate; candidates with equal labels are merged.

    Returns:
        `tuple`: Scores `[queries, groups]`, and the proponents as group numbers.
    """
    number = {label: i for i, label in enumerate(dict.fromkeys(groups))}
    of_row = np.array([number[label] for label in groups])
    merged = np.full((len(scores), len(number)), -np.inf, dtype=np.float32)
    for i, row in enumerate(scores):
        np.maximum.at(merged[i], of_row, np.nan_to_num(row, nan=-np.inf))
    merged[np.isneginf(merged)] = np.nan
    return merged, [sorted({int(of_row[row]) for row in rows}) for rows in proponents]


def reciprocal_ranks(scores: np.ndarray, proponents: Sequence[Sequence[int]]) -> np.ndarray:
    """Return each query's [`reciprocal_rank`], `[queries]`."""
    return np.array([reciprocal_rank(row, rows) for row, rows in zip(scores, proponents, strict=True)])


def recalls_at_k(scores: np.ndarray, proponents: Sequence[Sequence[int]], k: int) -> np.ndarray:
    """Return each query's [`recall_at_k`], `[queries]`."""
    return np.array([recall_at_k(row, rows, k) for row, rows in zip(scores, proponents, strict=True)])


def worst_hub(scores: np.ndarray, k: int = 10) -> float:
    """Return the largest share of queries that have the same candidate among their best k.

    1 means that one candidate ranks high for every query. Equal scores rank in row order.
    """
    best = best_first(scores)[:, :k]
    return float(np.bincount(best.ravel()).max() / len(scores))


def distinct(scores: np.ndarray, k: int = 10) -> float:
    """Return the share of distinct candidates among the best k of all queries.

    1 if no two queries share a candidate, 1 / queries if all have the same best k. It needs no labels, and shows
    whether rankings depend on the query. Equal scores rank in row order.
    """
    best = best_first(scores)[:, :k]
    return len(np.unique(best)) / best.size


def best_first(scores: np.ndarray) -> np.ndarray:
    """Return indices along the last axis, best first: equal scores in order of their index, NaN last."""
    return np.argsort(-np.nan_to_num(scores, nan=-np.inf), axis=-1, kind="stable")


def evaluate(
    scores: np.ndarray,
    proponents: Sequence[Sequence[int]],
    *,
    ks: Sequence[int] = KS,
    groups: Sequence[object] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Return metrics averaged over queries.

    Args:
        scores (`np.ndarray`): Scores, `[queries, candidates]`, NaN for no score.
        proponents (`Sequence[Sequence[int]]`): For each query, the row numbers of its proponents. Queries without any
            are left out.
        ks (`Sequence[int]`, defaults to 1, 3, 5, 10 and 25): Cut-offs of precision and recall; those above
            the number of candidates are skipped.
        groups (`Sequence`, *optional*): Candidates with the same label are merged first ([`collapse`]).
        resamples (`int`, defaults to 1000): Number of bootstrap resamples for the interval of the MRR.
        seed (`int`, defaults to 0): Seed of the resamples.

    Returns:
        `dict[str, float]`: `mrr` with its standard error `mrr_se` and 95% bootstrap interval `mrr_low`, `mrr_high`;
        `precision@k`, `recall@k`; `tied`, the share of queries whose first proponent has the same score as a candidate
        that is not a proponent; `mrr_random`, the MRR of a random order.

    Raises:
        ValueError: If there are no queries, none has a proponent, the lengths of `scores` and `proponents` differ, or
            a proponent is not a row of the candidates.
    """
    if len(scores) == 0 or len(scores) != len(proponents):
        raise ValueError(
            f"{len(proponents)} lists of proponents for {len(scores)} queries: give one list for each query."
        )
    for query, rows in enumerate(proponents):
        beyond = [row for row in rows if not 0 <= row < scores.shape[1]]
        if beyond:
            raise ValueError(
                f"Query {query} has proponent {beyond[0]}, which is not a row of the {scores.shape[1]} candidates."
            )
    known = [query for query, rows in enumerate(proponents) if len(rows)]
    if not known:
        raise ValueError("No query has a proponent: there is nothing to find.")
    scores, proponents = scores[known], [proponents[query] for query in known]
    if groups is not None:
        scores, proponents = collapse(scores, proponents, groups)
    pairs = list(zip(scores, proponents, strict=True))
    reciprocal = reciprocal_ranks(scores, proponents)
    result: dict[str, Any] = {
        **with_interval("mrr", reciprocal, resamples=resamples, seed=seed),
        "mrr_se": standard_error(reciprocal),
        "mrr_random": np.mean([random_reciprocal_rank(scores.shape[1], len(rows)) for rows in proponents]),
        "tied": np.mean([_is_tied(row, rows) for row, rows in pairs]),
    }
    for k in (k for k in ks if k <= scores.shape[1]):
        result[f"precision@{k}"] = np.mean([precision_at_k(row, rows, k) for row, rows in pairs])
        result[f"recall@{k}"] = recalls_at_k(scores, proponents, k).mean()
    return {name: float(value) for name, value in result.items()}


def _is_tied(scores: np.ndarray, proponents: Sequence[int]) -> bool:
    rows = np.asarray(proponents, dtype=int)
    if len(rows) == 0 or np.isnan(scores[rows]).all():
        return False
    best = np.nanmax(scores[rows])
    return bool(np.sum(scores == best) > np.sum(scores[rows] == best))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the rank correlation, equal values sharing their mean rank; 0 if one argument is constant.

    Raises:
        ValueError: If a value is NaN, which has no rank.
    """
    if np.isnan(a).any() or np.isnan(b).any():
        raise ValueError("NaN has no rank: leave out subsets or queries without a finite loss or score.")
    from scipy.stats import spearmanr

    constant = len(a) < 2 or (a == a[0]).all() or (b == b[0]).all()
    return 0.0 if constant else float(spearmanr(a, b).statistic)


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks, 1 for the highest value; equal values share their mean rank."""
    from scipy.stats import rankdata

    return rankdata(-values)


def detection(scores: np.ndarray, wrong: np.ndarray, share: float = 0.15) -> dict[str, float]:
    """Return how well the highest scores detect wrong examples.

    Args:
        scores (`np.ndarray`): Scores, `[examples]`; NaN ranks last.
        wrong (`np.ndarray`): Booleans, `[examples]`: which examples are wrong; some are, and some are not.
        share (`float`, defaults to 0.15): Share of the examples that is examined.

    Returns:
        `dict[str, float]`: `detected_at_15_percent`, the share of all wrong examples that are among the examined ones;
        `ceiling_at_15_percent`, its largest possible value; `precision_at_15_percent`, the share of the examined
        examples that are wrong; `auc`, the probability that a wrong example scores above a right one, ties counting
        half.
    """
    ranks = mean_ranks(-np.nan_to_num(scores.astype(np.float64), nan=-np.inf))  # 1 for the lowest
    bad, good = int(wrong.sum()), int((~wrong).sum())
    examined = max(1, round(share * len(scores)))
    hits = int(found_by(scores, wrong)[examined - 1])
    name = f"at_{round(100 * share)}_percent"
    return {
        f"detected_{name}": hits / bad,
        f"ceiling_{name}": min(1.0, examined / bad),
        f"precision_{name}": hits / examined,
        "auc": float((ranks[wrong].sum() - bad * (bad + 1) / 2) / (bad * good)),
    }


def found_by(scores: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Return the number of wrong examples among the n highest scores, for n from 1, `[examples]`; NaN ranks last."""
    return wrong[best_first(scores)].cumsum()
