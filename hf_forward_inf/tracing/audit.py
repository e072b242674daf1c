"""How many of a query's best candidates a screen finds, estimated from random others that were scored, too."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_forward_inf.plan import DEPTH, Audit

LEAST = 0.3
"""A screen that finds less than this share of the best candidates fails. On five sets of texts the default one finds
.44 to .85: where few of the ten best have a cause, the others are noise, which no screen finds."""
ROUNDS = 50
"""Rounds in which frequencies are fitted."""


@dataclass(frozen=True)
class Scored:
    """Scores of one query's candidates.

    Args:
        rows (`np.ndarray`): Row numbers of the candidates that a screen has kept, the best first.
        scores (`np.ndarray`): Their scores.
        drawn (`np.ndarray`): Row numbers of others that were drawn at random.
        audited (`np.ndarray`): Their scores.
        others (`int`): Number of candidates from which these were drawn.
    """

    rows: np.ndarray
    scores: np.ndarray
    drawn: np.ndarray
    audited: np.ndarray
    others: int

    @property
    def above(self) -> np.ndarray:
        """How many of the drawn score above the j-th best of the kept, j = 1 to 10: `[10]`."""
        known = np.sort(self.scores[~np.isnan(self.scores)])[::-1][:DEPTH]
        marks = np.concatenate([known, np.repeat(known[-1:], DEPTH - len(known))])
        return (self.audited[:, None] > marks).sum(axis=0)


def audit_of(screen: str, found: Sequence[Scored]) -> Audit | None:
    """Estimate a screen's recall from the queries that have been scored; `None` where nothing was drawn.

    The j-th best of the kept is among the 10 best of all if at most 10 - j others score above it. How many do is
    unknown: only a few of the others were drawn, and a hit among them stands for many. So the frequencies of these
    numbers are fitted to all queries' counts (empirical Bayes), and each query has its own numbers' probabilities by
    them and by its count.

    Args:
        screen (`str`): The screen's name.
        found (`list[Scored]`): The queries.
    """
    found = [one for one in found if len(one.drawn) and not np.isnan(one.scores).all()]
    if not found:
        return None
    above = np.array([one.above for one in found])
    drawn, others = (
        np.array([number]).T for number in zip(*((len(one.drawn), one.others) for one in found), strict=True)
    )
    numbers = _numbers(int(others.max()))
    shares = np.minimum(numbers / others, 1.0)  # [queries, numbers]
    recalls = np.zeros(len(found))
    for j in range(1, DEPTH + 1):
        posterior = _posterior(above[:, [j - 1]], drawn, shares, numbers)
        recalls += (posterior * (numbers <= DEPTH - j)).sum(axis=1) / DEPTH
    # Besides how the queries differ, a query's own recall is not known: as if it were uniform around its estimate.
    error = np.sqrt((recalls.var() + (recalls * (1 - recalls)).mean() / 3) / len(found))
    return Audit(screen, int(drawn.sum()), int(above[:, -1].sum()), float(recalls.mean()), float(error))


def _numbers(others: int) -> np.ndarray:
    """Return numbers of others that may score above a candidate: all small ones, some large ones."""
    large = np.logspace(1, np.log10(max(others, 11)), 30)
    numbers = np.unique(np.concatenate([np.arange(DEPTH + 1), large.round()]))
    return numbers[numbers <= others]


def _posterior(above: np.ndarray, drawn: np.ndarray, shares: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the probability of each number for each query, `[queries, numbers]`."""
    chances = shares**above * (1 - shares) ** (drawn - above)
    prior = np.gradient(np.log(numbers + 0.5)) if len(numbers) > 1 else np.ones(1)  # of unknown magnitude
    prior /= prior.sum()
    frequencies = prior
    for _ in range(ROUNDS):
        posterior = chances * frequencies
        posterior /= posterior.sum(axis=1, keepdims=True)
        frequencies = (posterior.sum(axis=0) + prior) / (len(above) + 1)
    return posterior


def failed(audit: Audit | None) -> bool:
    """Return whether a screen finds too little, beyond the error of the estimate."""
    return audit is not None and audit.recall + 2 * audit.error < LEAST
