"""Trace within a time budget: candidates are scored in slices until the time is over."""

import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from accelerate.utils import broadcast_object_list

from hf_forward_inf.utils.fingerprints import uncached
from hf_forward_inf.utils.processes import process_state, progress_bars

FIRST = 64
"""Size of the first slice, which is scored however long that takes."""


def slices(order: np.ndarray, seconds: float, alone: bool = False) -> Iterator[np.ndarray]:
    """Yield slices of the candidates until the time is over.

    Each slice is as large as can be scored in the remaining time at the speed so far, but at most twice as large as
    all slices before it together. All processes of a run get the same slices.

    Args:
        order (`np.ndarray`): Row numbers, in the order in which to score them.
        seconds (`float`): The time budget, from the first slice on. If the first slice takes longer, a warning says
            so.
        alone (`bool`, defaults to `False`): Whether this process scores by itself: it agrees with no other, and
            doesn't warn.

    Yields:
        `np.ndarray`: Row numbers, ascending.

    Raises:
        ValueError: If `seconds` is not above 0.
    """
    if not seconds > 0:
        raise ValueError(f"time_budget={seconds} must be above 0 seconds.")
    start = time.perf_counter()
    done, size = 0, FIRST
    while size > 0 and done < len(order):
        rows = order[done : done + size]
        yield np.sort(rows)
        spent = time.perf_counter() - start
        if done == 0 and spent > seconds and not alone:
            warnings.warn(
                f"time_budget={seconds:g} s was over before the first {len(rows)} candidates were scored "
                f"({spent:.2g} s): only they have scores.",
                stacklevel=3,
            )
        done += len(rows)
        size = min(2 * done, int(done * (seconds - spent) / spent))
        size = size if alone else _agreed(size)


def within(
    seconds: float, order: np.ndarray, queries: int, score: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Score as many candidates as a time budget allows.

    Args:
        seconds (`float`): The time budget.
        order (`np.ndarray`): Row numbers of all candidates, in the order in which to score them.
        queries (`int`): Number of queries.
        score (`Callable`): Returns the scores of some rows, `[queries, rows]`.

    Returns:
        `tuple`: Scores, float32 `[queries, candidates]`, NaN where time was over; and the row numbers of the others.
    """
    scores = np.full((queries, len(order)), np.nan, dtype=np.float32)
    reached = []
    with uncached(), progress_bars(False):  # slices differ from run to run
        for rows in slices(order, seconds):
            scores[:, rows] = score(rows)
            reached.append(rows)
    return scores, np.sort(np.concatenate(reached))


def _agreed(size: int) -> int:
    """Return the main process's size in every process: their clocks differ."""
    if process_state().num_processes == 1:
        return size
    return broadcast_object_list([size])[0]
