"""Choose the settings without labels, by self-retrieval (Algorithm 1: how K and alpha are chosen)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from hf_forward_inf.ascent import AscentConfig
from hf_forward_inf.hubs import correct_hubs
from hf_forward_inf.metrics import reciprocal_rank

if TYPE_CHECKING:
    from hf_forward_inf.forward_inf import ForwardInf

RADII = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Radii tried if the user names none."""


@dataclass(frozen=True)
class Tuning:
    """What self-retrieval found.

    Args:
        best (`AscentConfig`): The settings to use.
        references (`datasets.Dataset`, *optional*): Reference queries, if correcting hubs retrieved better.
        trials (`list[dict]`): One row a trial: `radius`, `steps`, `hubs`, `self_mrr`, `chosen`.
    """

    best: AscentConfig
    references: Dataset | None
    trials: list[dict[str, Any]]

    def __str__(self) -> str:
        lines = ["  radius  steps  hubs corrected  self-retrieval MRR"]
        for trial in self.trials:
            mark = "*" if trial["chosen"] else " "
            corrected = "yes" if trial["hubs"] else "no"
            lines.append(
                f"{mark} {trial['radius']:6g}  {trial['steps']:5d}  {corrected:>14}  {trial['self_mrr']:18.3f}"
            )
        return "\n".join(lines)


def tune(
    attributor: "ForwardInf",
    candidates: Dataset,
    *,
    radii: Sequence[float] = RADII,
    steps: Sequence[int] = (1,),
    queries: int = 30,
    pool: int = 1024,
    seed: int | None = None,
) -> Tuning:
    """Choose radius and steps so that training examples, used as queries, find themselves.

    Some candidates are drawn as queries. Under a good setting each ranks first among the candidates; the
    measure is the mean reciprocal rank of itself (or of a row equal to it). Each setting is tried as it is and
    with hubs corrected by the other drawn queries; the correction is taken only where it retrieves better.
    Among equally good radii the middle one is taken: the edges of a plateau are where it ends.

    Args:
        attributor (`ForwardInf`): Its model, adapter and other ascent options are used.
        candidates (`datasets.Dataset`): Where queries and candidates are drawn from.
        radii (`Sequence[float]`): Radii to try.
        steps (`Sequence[int]`): Numbers of steps to try.
        queries (`int`, defaults to 30): Candidates drawn as queries.
        pool (`int`, defaults to 1024): Candidates they are ranked among, at most.
        seed (`int`, *optional*): Draws both. Defaults to the ascent's seed.

    Raises:
        ValueError: If there are fewer than 2 candidates, or no setting retrieves anything.
    """
    if len(candidates) < 2:
        raise ValueError(f"Tuning needs at least 2 candidates to tell apart, not {len(candidates)}.")
    draw = np.random.default_rng(attributor.ascent.seed if seed is None else seed).permutation(len(candidates))
    among = candidates.select(np.sort(draw[:pool]))
    own = np.sort(np.searchsorted(np.sort(draw[:pool]), draw[:queries]))
    sample = among.select(own)
    columns = attributor.adapter.columns_in(among.column_names)
    texts = list(zip(*(among[column] for column in columns), strict=True))
    selves = [[j for j, text in enumerate(texts) if text == texts[row]] for row in own]

    trials = []
    for k in steps:
        for radius in radii:
            trial = _trial(attributor.ascent, radius, k)
            scores = attributor.with_options(ascent=trial).score(sample, among)
            for hubs in (False, True) if len(sample) > 2 else (False,):
                found = _corrected_by_each_other(scores) if hubs else scores
                mrr = np.mean([reciprocal_rank(row, rows) for row, rows in zip(found, selves, strict=True)])
                trials.append({"radius": radius, "steps": k, "hubs": hubs, "self_mrr": float(mrr), "chosen": False})
    best = _choose(trials)
    best["chosen"] = True
    return Tuning(_trial(attributor.ascent, best["radius"], best["steps"]), sample if best["hubs"] else None, trials)


def _trial(ascent: AscentConfig, radius: float, steps: int) -> AscentConfig:
    return replace(ascent, radius=radius, learning_rate=None, optimizer="sgd", steps=steps)


def _corrected_by_each_other(scores: np.ndarray) -> np.ndarray:
    """Correct each query's hubs by the other queries."""
    others = (np.delete(scores, i, axis=0) for i in range(len(scores)))
    return np.concatenate([correct_hubs(row[None], rest) for row, rest in zip(scores, others, strict=True)])


def _choose(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The best trial: uncorrected before corrected, fewer steps before more, the middle of equal radii."""
    highest = max(trial["self_mrr"] for trial in trials)
    if highest == 0:
        raise ValueError("No setting retrieves anything: do the candidates' losses have gradients at all?")
    equal = [trial for trial in trials if trial["self_mrr"] >= highest - 1e-9]
    equal = [t for t in equal if t["hubs"] == min(u["hubs"] for u in equal)]
    equal = [t for t in equal if t["steps"] == min(u["steps"] for u in equal)]
    return sorted(equal, key=lambda trial: trial["radius"])[len(equal) // 2]
