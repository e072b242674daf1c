"""Levels: which candidates stand out among all scores of their query.

The null is the query's own scores: few candidates cause an output, so the others show what a score is that means
nothing. The limits were chosen on built-in facts, traced with the defaults by a tiny mT5 (48 queries) and a tiny Llama
(32). A row is marked for 4% and 3% of queries whose facts are taken out, none if all rows that say the answer are,
none of untrained models', 2% and 0% of answers that no row has; a row that states the fact for 94% and 69%
(`benchmarks/levels.py`). They hold for steps of the default length.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Level = Literal["strong", "some", "none"]
SOME, STRONG = 7.0, 11.0
"""Nats above the median from which a row has some effect, and a strong one: factors of 1,100 and 60,000."""
APART = 50.0
"""Spreads above the median without which it has none, however many nats it rises: all others may rise as well."""
EXTREME = 0.02
"""Share of scores, the farthest from the median, that don't count for the spread: causes may be among them."""
FEWEST = 100
"""Fewer scores say nothing about what stands out."""
RULE = (
    f"A row has some effect if its score is {SOME:.0f} nats and {APART:.0f} spreads above the median of its query's "
    f"scores, and a strong one from {STRONG:.0f} nats on; the spread is the root mean square distance from the "
    f"median, without the most extreme {EXTREME:.0%}."
)
"""The rule in one line."""


@dataclass(frozen=True)
class Background:
    """What all scores of one query look like: the null that its best candidates are compared with.

    Args:
        count (`int`): Number of scores that were computed and are finite.
        median (`float`): Their median.
        spread (`float`): Root mean square distance from the median, without the most extreme 2%.
        strong (`int`): Number of strong candidates.
        some (`int`): Number of those with some effect.
        percentiles (`list[float]`): 101 of them, from the lowest score to the highest.
    """

    count: int
    median: float
    spread: float
    strong: int
    some: int
    percentiles: list[float]

    def distance(self, scores: np.ndarray) -> np.ndarray:
        """Return how many spreads scores lie above the median."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return (np.asarray(scores, dtype=float) - self.median) / self.spread

    def levels(self, scores: np.ndarray, nats: bool) -> list[Level] | None:
        """Return the level of each score; `None` if it can't be known.

        Args:
            scores (`np.ndarray`): Scores of this query.
            nats (`bool`): Whether they are rises of a language model's loss, in nats: of others it is not known which
                mean something. And too few scores are no null.
        """
        if not nats or self.count < FEWEST:
            return None
        rises = np.where(self.distance(scores) >= APART, np.asarray(scores, dtype=float) - self.median, 0.0)
        return ["strong" if rise >= STRONG else "some" if rise >= SOME else "none" for rise in rises]

    def to_dict(self) -> dict[str, Any]:
        """Return it as a row of a table."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "Background":
        """Return what [`to_dict`] has returned."""
        return cls(**row)


def background(scores: np.ndarray, computed: np.ndarray | None = None, nats: bool = False) -> Background:
    """Describe all scores of one query.

    Args:
        scores (`np.ndarray`): Scores, `[candidates]`; NaN for none.
        computed (`np.ndarray`, *optional*): bool `[candidates]`: the scores that were computed; others don't count.
        nats (`bool`, defaults to `False`): Whether scores are rises of a language model's loss, in nats.
    """
    known = np.isfinite(scores) if computed is None else np.isfinite(scores) & computed
    values = scores[known].astype(float)
    if not len(values):
        return Background(0, 0.0, 0.0, 0, 0, [0.0] * 101)
    median = float(np.median(values))
    percentiles = np.percentile(values, np.arange(101)).tolist()
    found = Background(len(values), median, _spread(values - median), 0, 0, percentiles)
    levels = found.levels(values, nats) or []
    return Background(len(values), median, found.spread, levels.count("strong"), levels.count("some"), percentiles)


def _spread(distances: np.ndarray) -> float:
    """Return the root mean square, without the most extreme; of all of them where the others are equal."""
    ordered = np.sort(np.abs(distances))
    inner = ordered[: max(1, len(ordered) - max(3, round(EXTREME * len(ordered))))]
    return float(np.sqrt(np.mean(inner**2)) or np.sqrt(np.mean(ordered**2)) or 1.0)


def sentence(found: Background | None, best: float | None, nats: bool) -> str:
    """Say in a sentence whether anything stands out.

    Args:
        found (`Background`, *optional*): All scores of the query; `None` if only its best are known.
        best (`float`, *optional*): The highest score; `None` if there is none.
        nats (`bool`): Whether scores are rises of a language model's loss, in nats.
    """
    if best is None:
        return "No scores: the gradient of the query is zero or not finite."
    if found is None:
        return "Only the best scores are known: whether they stand out can't be said."
    if found.count < FEWEST:
        return (
            f"Only {found.count} training rows have a score: too few to say whether one stands out "
            f"(that takes {FEWEST})."
        )
    marked = found.strong + found.some
    if marked:
        row = f"training rows stand{'s' if marked == 1 else ''} out"
        how = ", strongly" if found.strong == marked else f", {found.strong} of them strongly" if found.strong else ""
        return f"{marked:,} of {found.count:,} {row}{how}."
    if nats and best - found.median >= SOME / 2 and found.distance(np.array(best)) >= APART:
        return (
            f"No training row stands out beyond doubt: the best of {found.count:,} rises by {best - found.median:.1f} "
            f"nats, and {SOME:.0f} would count."
        )
    if nats:
        return f"Nothing in this data stands out: none of {found.count:,} training rows."
    distance = float(found.distance(np.array(best)))
    return (
        f"The best of {found.count:,} training rows is {distance:,.0f} spreads above the median of the scores; how "
        "many it takes to stand out was measured for language models only."
    )
