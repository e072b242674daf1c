"""Correct scores for hubs: candidates that rise for every query, whatever it says."""

import numpy as np


def correct_hubs(scores: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Divide each candidate's scores by how much it rises for reference queries.

    `score / (hub + floor)`, where `hub` is the candidate's mean score over the references, at least 0, its
    highest one left out (a reference drawn from the candidates would speak against itself), and `floor` the
    mean of all hubs, which keeps candidates that hardly ever rise from winning by division.

    Args:
        scores (`np.ndarray`): `[queries, candidates]`.
        references (`np.ndarray`): Scores of unrelated queries over the same candidates,
            `[references, candidates]`, at least 2.

    Returns:
        `np.ndarray`: Corrected scores, without a unit, `[queries, candidates]`.
    """
    if len(references) < 2:
        raise ValueError(f"Correcting hubs takes at least 2 reference queries, not {len(references)}.")
    known = np.nan_to_num(references, nan=0.0)
    hub = np.sort(known, axis=0)[:-1].mean(axis=0).clip(min=0)
    floor = hub.mean() or 1.0
    return (scores / (hub + floor)).astype(np.float32)


def standardised(scores: np.ndarray, deviation: np.ndarray | float | None = None) -> np.ndarray:
    """Measure each candidate's score by how it fares with all queries: (score - mean) / deviation, over the queries.

    Where every query shakes the same candidates, what tells is which query shakes one more than the others do. No
    labels are needed, only several queries on different things.

    Args:
        scores (`np.ndarray`): `[queries, candidates]`, at least 3 queries; with a deviation at least 2.
        deviation (`np.ndarray`, *optional*): `[candidates]`, or one for all, where it is known: few queries tell it
            badly.

    Raises:
        ValueError: If there are fewer.
    """
    check_enough(len(scores), 3 if deviation is None else 2)
    known = np.ma.masked_invalid(scores)
    if deviation is None:
        deviation = known.std(axis=0)
    return np.ma.filled((known - known.mean(axis=0)) / np.ma.maximum(deviation, 1e-12), np.nan).astype(np.float32)


def check_enough(queries: int, least: int = 3) -> None:
    """Refuse to standardise over fewer than 3 queries: raise a `ValueError` that says what to do."""
    if queries < least:
        raise ValueError(
            f"Standardising over queries takes at least {least} of them, not {queries}: trace others beside, such as "
            "what the model gives for other inputs."
        )
