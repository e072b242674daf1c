"""Checks of datasets and scores, and how messages name rows."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset

from hf_forward_inf.utils.processes import process_state


def check_dataset(rows: Any, role: str) -> None:
    """Check that queries or candidates are a dataset with rows.

    Args:
        rows (`Any`): Queries or candidates.
        role (`str`): `"queries"` or `"candidates"`, for messages.

    Raises:
        TypeError: If they are not a `datasets.Dataset`, but for example a stream or several splits.
        ValueError: If there are no rows.
    """
    if isinstance(rows, IterableDataset):
        raise TypeError(
            f"The {role} are a stream. Use ForwardInf.trace_stream(queries, stream) to trace a stream of candidates, "
            "or make a datasets.Dataset of its first rows: Dataset.from_list(list(stream.take(1000)))."
        )
    if not isinstance(rows, Dataset):
        hint = ""
        if isinstance(rows, DatasetDict):
            hint = f". Take one of its splits: {' or '.join(map(repr, rows))}"
        raise TypeError(f"The {role} must be a datasets.Dataset, not {type(rows).__name__}{hint}.")
    if len(rows) == 0:
        raise ValueError(f"There are no {role}: the dataset is empty.")


def check_rows(rows: Dataset, columns: Iterable[str], role: str) -> None:
    """Check that queries or candidates are a dataset with rows and the columns that are needed.

    Args:
        rows (`datasets.Dataset`): Queries or candidates.
        columns (`Iterable[str]`): Columns that they must have.
        role (`str`): `"queries"` or `"candidates"`, for messages.

    Raises:
        TypeError: If they are not a `datasets.Dataset`.
        ValueError: If there are no rows or a column is missing.
    """
    check_dataset(rows, role)
    for column in columns:
        if column not in rows.column_names:
            raise ValueError(
                f"The {role} have no column `{column}`; they have {', '.join(rows.column_names)}. "
                "Rename one (Dataset.rename_column; on the command line --input_column, --target_column), or give its "
                "name to the adapter or attributor."
            )


def looks_like_path(name: str) -> bool:
    """Return whether a name is a path: names on the hub have at most one slash and no suffix."""
    return bool(Path(name).suffix) or name.startswith((".", "/", "~")) or name.count("/") > 1


def listed(rows: np.ndarray) -> str:
    """Return row numbers as text for a message: the first ten, and their count."""
    named = ", ".join(str(row) for row in rows[:10])
    return f"row {named}" if len(rows) == 1 else f"rows {named}{', ...' if len(rows) > 10 else ''} ({len(rows)} rows)"


def lost_candidates(scores: np.ndarray) -> np.ndarray:
    """Return the places of candidates without a score, not counting queries that have no scores at all.

    Args:
        scores (`np.ndarray`): `[queries, candidates]`.
    """
    lost = np.isnan(scores)
    return np.flatnonzero(lost[~lost.all(axis=1)].any(axis=0))


def warn_of_lost(scores: np.ndarray, rows: np.ndarray) -> None:
    """Warn of rows without a score, and of queries whose scores are all 0, and say why, on the main process.

    Args:
        scores (`np.ndarray`): `[queries, candidates]`.
        rows (`np.ndarray`): The candidates' row numbers.
    """
    if not process_state().is_main_process:
        return
    queries, candidates = np.flatnonzero(np.isnan(scores).all(axis=1)), rows[lost_candidates(scores)]
    if len(queries):
        warnings.warn(
            f"Queries {listed(queries)}: the gradient is zero or not finite, so they have no scores. If the model is "
            "in float16, load it in bfloat16 or float32.",
            stacklevel=3,
        )
    still = np.flatnonzero((scores == 0).any(axis=1) & ~(np.abs(scores) > 0).any(axis=1))
    if len(still):
        warnings.warn(
            f"Queries {listed(still)}: the step changes no candidate's loss, so all scores are 0. If the radius is "
            "tiny, the step is lost in rounding: take a longer one.",
            stacklevel=3,
        )
    if len(candidates):
        warnings.warn(
            f"Candidates {listed(candidates)}: the loss is NaN or infinite, so they are ranked last.", stacklevel=3
        )
