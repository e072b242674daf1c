"""Whether what is cached is what would be computed now: a few random rows are computed again and compared."""

import numpy as np
import torch
from torch import nn

from hf_forward_inf.adapters.base import Adapter
from hf_forward_inf.utils.models import is_quantised

ROWS = 3
"""Rows that are compared, drawn at random."""
TOLERANCE, HALF_TOLERANCE = 2e-3, 5e-2
"""Largest difference that other batches, threads or devices explain, as a share of the largest value; and the same in
16 bits or less. Losses in float32 differ by 1e-6 to 1e-4 between batches."""


def is_first_use(adapter: Adapter, name: str) -> bool:
    """Return whether an adapter has not yet computed or compared what has this name: it need not be compared twice."""
    seen = adapter.__dict__.setdefault("_seen", set())
    first = name not in seen
    seen.add(name)
    return first


def drawn_rows(rows: np.ndarray) -> np.ndarray:
    """Draw a few of some rows, whatever the seeds are."""
    return np.sort(np.random.default_rng().choice(rows, min(ROWS, len(rows)), replace=False))


def tolerance_of(model: nn.Module) -> float:
    """Return the share of the largest value by which equal rows may differ."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    exact = kinds <= {torch.float32, torch.float64} and not torch.is_autocast_enabled("cpu")
    return TOLERANCE if exact and not is_quantised(model) else HALF_TOLERANCE


def agree(before: np.ndarray, now: np.ndarray, tolerance: float) -> bool:
    """Return whether two arrays are equal up to a share of each column's largest value; NaN equals NaN."""
    with np.errstate(invalid="ignore"):
        finite = np.where(np.isfinite(before), np.abs(before), 0)
        room = tolerance * finite.max(axis=0, initial=0)
        near = np.abs(before - now) <= room
    return bool((near | (before == now) | (np.isnan(before) & np.isnan(now))).all())
