"""Checks of what users bring, and how messages name rows."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from hf_forward_inf.utils.processes import process_state


def check_dataset(rows: Any, role: str) -> None:
    """Refuse what is no dataset of rows.

    Args:
        rows: Queries or candidates.
        role (`str`): `"queries"` or `"candidates"`, for messages.

    Raises:
        TypeError: If they are a stream, several splits, or something else.
        ValueError: If there are no rows.
    """
    if isinstance(rows, IterableDataset):
        raise TypeError(
            f"The {role} are a stream. ForwardInf.trace_stream(queries, stream) traces candidates as they come; all "
            "else takes a datasets.Dataset: Dataset.from_list(list(stream.take(1000))) makes one of the first rows."
        )
    if not isinstance(rows, Dataset):
        splits = f": take one of its splits, {' or '.join(map(repr, rows))}" if isinstance(rows, dict) and rows else ""
        raise TypeError(f"The {role} must be a datasets.Dataset, not {type(rows).__name__}{splits}.")
    if len(rows) == 0:
        raise ValueError(f"There are no {role}: the dataset is empty.")


def check_rows(rows: Dataset, columns: Iterable[str], role: str) -> None:
    """Refuse rows that can't be used.

    Args:
        rows (`datasets.Dataset`): Queries or candidates.
        columns (`Iterable[str]`): Columns that they must have.
        role (`str`): As in [`check_dataset`].

    Raises:
        TypeError: As [`check_dataset`] does.
        ValueError: If there are no rows or a column is missing.
    """
    check_dataset(rows, role)
    for column in columns:
        if column not in rows.column_names:
            raise ValueError(
                f"The {role} have no column `{column}`; they have {', '.join(rows.column_names)}. "
                "Rename one (Dataset.rename_column), or name yours when you make the adapter or attributor."
            )


def looks_like_path(name: str) -> bool:
    """Whether a name is a file's or a folder's: one on the hub has at most one slash, and no ending."""
    return bool(Path(name).suffix) or name.startswith((".", "/", "~")) or name.count("/") > 1


def listed(rows: np.ndarray) -> str:
    """Name rows for a message: the first ten, and how many there are."""
    named = ", ".join(str(row) for row in rows[:10])
    return f"row {named}" if len(rows) == 1 else f"rows {named}{', ...' if len(rows) > 10 else ''} ({len(rows)} rows)"


def lost_candidates(scores: np.ndarray) -> np.ndarray:
    """Tell which candidates have no score, by place; a query without any, which moves the model nowhere, aside.

    Args:
        scores (`np.ndarray`): `[queries, candidates]`.
    """
    lost = np.isnan(scores)
    return np.flatnonzero(lost[~lost.all(axis=1)].any(axis=0))


def warn_of_lost(scores: np.ndarray, rows: np.ndarray) -> None:
    """Say which rows have no score, and why, on the main process.

    Args:
        scores (`np.ndarray`): `[queries, candidates]`.
        rows (`np.ndarray`): The candidates' row numbers.
    """
    if not process_state().is_main_process:
        return
    queries, candidates = np.flatnonzero(np.isnan(scores).all(axis=1)), rows[lost_candidates(scores)]
    if len(queries):
        warnings.warn(
            f"The gradient of queries {listed(queries)} is zero or not finite, so it moves the model nowhere: "
            "no scores for them. If the model is in float16, load it in bfloat16 or float32.",
            stacklevel=3,
        )
    if len(candidates):
        warnings.warn(
            f"The loss of candidates {listed(candidates)} is NaN or infinite: they are ranked last.", stacklevel=3
        )
