"""Corrections for hubs: candidates whose loss rises for every query."""

import numpy as np


def correct_hubs(scores: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return scores divided by each candidate's mean score for reference queries.

    `score / (hub + floor)`, where `hub` is the candidate's mean score over the references, at least 0, without its
    highest one (which may come from a reference that was drawn from the candidates), and `floor` the mean of all hubs,
    which keeps candidates with a hub near 0 from winning by division.

    Args:
        scores (`np.ndarray`): Scores, `[queries, candidates]`.
        references (`np.ndarray`): Scores of at least 2 unrelated queries for the same candidates, `[references,
            candidates]`.

    Returns:
        `np.ndarray`: Corrected scores, float32 `[queries, candidates]`, without a unit.

    Raises:
        ValueError: If there are fewer than 2 references.
    """
    if len(references) < 2:
        raise ValueError(f"Correcting hubs needs at least 2 reference queries, not {len(references)}.")
    known = np.nan_to_num(references, nan=0.0)
    hub = np.sort(known, axis=0)[:-1].mean(axis=0).clip(min=0)
    floor = hub.mean() or 1.0
    return (scores / (hub + floor)).astype(np.float32)


def standardised(scores: np.ndarray, deviation: np.ndarray | float | None = None) -> np.ndarray:
    """Return scores relative to each candidate's scores for all queries: (score - mean) / standard deviation.

    If the losses of the same candidates rise for every query, this shows for which query one rises more than for the
    others. No labels are needed, only queries on different subjects.

    Args:
        scores (`np.ndarray`): Scores, `[queries, candidates]`: at least 3 queries, or 2 if `deviation` is given.
        deviation (`np.ndarray` or `float`, *optional*): Each candidate's deviation, `[candidates]`, or one for all.
            Defaults to the standard deviation over the queries, a rough estimate if they are few.

    Returns:
        `np.ndarray`: float32 `[queries, candidates]`, NaN where there is no score.

    Raises:
        ValueError: If there are fewer queries.
    """
    check_enough(len(scores), 3 if deviation is None else 2)
    known = np.ma.masked_invalid(scores)
    if deviation is None:
        deviation = known.std(axis=0)
    return np.ma.filled((known - known.mean(axis=0)) / np.ma.maximum(deviation, 1e-12), np.nan).astype(np.float32)


def check_enough(queries: int, least: int = 3) -> None:
    """Raise a `ValueError` if there are too few queries to standardise over."""
    if queries < least:
        raise ValueError(
            f"Standardising over queries needs at least {least} of them, not {queries}: trace more, such as the "
            "model's outputs for other inputs."
        )
