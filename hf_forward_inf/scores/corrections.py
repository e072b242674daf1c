"""Corrections of scores: relative to those of other queries."""

import numpy as np


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
