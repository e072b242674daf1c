"""A strip that shows where the best rows are among all scores of a query."""

from collections.abc import Sequence
from typing import Any

from hf_forward_inf.scores.levels import Background

WIDTH = 1000
"""Width of the drawing."""


def strip(found: Background | None, best: Sequence[tuple[float, str]]) -> dict[str, Any] | None:
    """Return what the template draws; `None` if all scores are not known, or all the same.

    Args:
        found (`Background`, *optional*): All scores of the query.
        best (`list[tuple[float, str]]`): Score and level of the rows shown.
    """
    if found is None or not best or found.percentiles[0] >= found.percentiles[-1]:
        return None
    low, high = found.percentiles[0], found.percentiles[-1]

    def place(score: float) -> float:
        return round(10 + (WIDTH - 20) * min(1.0, max(0.0, (score - low) / (high - low))), 1)

    ticks = sorted({place(score) for score in found.percentiles})
    return {
        "ticks": " ".join(f"M{x} 14v12" for x in ticks),
        "box": (place(found.percentiles[5]), max(2.0, place(found.percentiles[95]) - place(found.percentiles[5]))),
        "dots": [(place(score), level) for score, level in reversed(best)],
        "low": low,
        "high": high,
        "most": found.percentiles[99],
        "text": (
            f"Of {found.count:,} scores from {low:.3g} to {high:.3g}, half are below {found.percentiles[50]:.3g} and "
            f"99% below {found.percentiles[99]:.3g}; the best is {best[0][0]:.3g}."
        ),
    }
