"""Shortcuts checked on a model before they are taken: rows in batches, and the model in two parts."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hf_forward_inf.utils.processes import process_state

SAME_LOSS = 1e-5
"""Relative difference up to which the same operations give the same loss."""
SAME_ROW = 1e-3
"""Relative difference up to which a row has the same loss in batches of other shapes."""
ROUNDING = 0.05
"""The same if weights have less than float32's precision."""
RANDOM = 1e-2
"""Relative difference between two runs beyond which a model draws at random."""
Row: TypeAlias = dict[str, Any]


@torch.no_grad()
def rows_agree(model: nn.Module, losses: Callable[[Sequence[Row]], Tensor], rows: Sequence[Row]) -> bool:
    """Return whether rows have the same losses together as each by itself; warn if not.

    Args:
        model (`torch.nn.Module`): The model.
        losses (`Callable`): Given encoded rows, returns their losses in one batch, `[rows]`.
        rows (`list[dict]`): Encoded rows.

    Raises:
        ValueError: If the model returns another loss each time it is run.
    """
    alone, again = (torch.cat([losses([row]) for row in rows]) for _ in range(2))
    size, noise = alone.abs().clamp(min=1), (again - alone).abs()
    if (noise > RANDOM * size).any():
        raise ValueError(
            f"{type(model).__name__} returns another loss each time it is run: it draws at random, so its losses "
            "can't be compared. If its configuration can switch that off, do so."
        )
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    try:
        difference = (losses(rows) - alone).abs()
        if not (difference > 4 * noise + (SAME_ROW if exact else ROUNDING) * size).any():
            return True
        why = f"differs by up to {difference.max().item():.2g}"
    except ValueError as error:  # classifiers without a padding token
        why = f"can't be computed: {error}"
    _warn(
        f"The loss that {type(model).__name__} gives a row in a batch {why}, compared with that of the row by itself: "
        "rows are run one by one, which is slower."
    )
    return False


@torch.no_grad()
def parts_agree(model: nn.Module, whole: Callable[[], Tensor], parts: Callable[[], Tensor]) -> bool:
    """Return whether a model that is run in two parts gives the same losses as the whole; warn if not.

    Args:
        model (`torch.nn.Module`): The model.
        whole (`Callable`): Returns the terms of a row's loss from the whole model.
        parts (`Callable`): Returns them from the second part, after the first; any error means that they differ.
    """
    expected, again = whole(), whole()
    try:
        difference = (parts() - expected).abs().max().item()
        noise = 4 * (again - expected).abs().max().item()  # kernels may sum in any order
        if difference <= noise + SAME_LOSS * max(1.0, expected.abs().max().item()):
            return True
        why = f"a term of the first row's loss would differ by {difference:.2g}"
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    _warn(
        f"{type(model).__name__} can't be run in two parts ({why}): it is run whole for every query, which is slower."
    )
    return False


def _warn(text: str) -> None:
    if process_state().is_main_process:
        warnings.warn(text, stacklevel=4)
