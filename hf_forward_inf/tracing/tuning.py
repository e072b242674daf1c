"""Choose the settings without labels, by self-retrieval (Algorithm 1: how K and alpha are chosen) or by retraining."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from datasets import Dataset

from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.scores.corrections import correct_hubs
from hf_forward_inf.scores.metrics import distinct, lds_by_query, reciprocal_ranks
from hf_forward_inf.scores.retraining import Retrained

RADII, RELATIVE_RADII = (0.1, 0.3, 1.0, 3.0, 10.0), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Radii tried if the user names none, absolute or relative as the attributor's are."""
COLUMNS = {
    "direction": ("direction", "s"),
    "damping": ("damping", "g"),
    "radius": ("radius", "g"),
    "steps": ("steps", "d"),
    "hubs": ("hubs corrected", "s"),
    "self_mrr": ("self-retrieval MRR", ".3f"),
    "distinct": ("distinct in top 10", ".3f"),
    "lds": ("LDS", ".3f"),
}
"""What is shown of a trial, where it is known: heads and formats."""


@dataclass(frozen=True)
class Tuning:
    """What the trials found.

    Args:
        best (`AscentConfig`): The settings to use.
        references (`datasets.Dataset`, *optional*): Reference queries, if correcting hubs retrieved better.
        trials (`list[dict]`): One row a trial: `direction`, `damping`, `radius`, `steps`, `hubs`, `self_mrr` and
            `distinct`, or `lds`, `chosen`.
    """

    best: AscentConfig
    references: Dataset | None
    trials: list[dict[str, Any]]

    def __str__(self) -> str:
        shown = {name: form for name, (_, form) in COLUMNS.items() if name in self.trials[0]}
        rows = [[COLUMNS[name][0] for name in shown]]
        for trial in self.trials:
            values = {**trial, "hubs": "yes" if trial["hubs"] else "no"}
            rows.append(["-" if values[n] is None else format(values[n], form) for n, form in shown.items()])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        marks = [" ", *("*" if trial["chosen"] else " " for trial in self.trials)]
        lines = ("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(f"{mark} {line}" for mark, line in zip(marks, lines, strict=True))


@dataclass(frozen=True)
class _Judge:
    """What the settings are tried on, and how good their scores are: figures whose product is 1 at best."""

    queries: Dataset
    candidates: Dataset
    judge: Callable[[np.ndarray], dict[str, float]]


def tune(
    attributor: Scorer,
    candidates: Dataset,
    *,
    radii: Sequence[float] | None = None,
    steps: Sequence[int] = (1,),
    directions: Sequence[str] | None = None,
    dampings: Sequence[float] | None = None,
    retrained: Retrained | None = None,
    queries: int = 30,
    pool: int = 1024,
    seed: int | None = None,
) -> Tuning:
    """Choose radius, steps, direction and damping so that training examples, used as queries, find themselves.

    Some candidates are drawn as queries. Under a good setting each ranks first among the candidates, and what ranks
    high for one does not rank high for all: the measure is the mean reciprocal rank of itself (or of a row equal to
    it), times the share of different candidates among all top tens ([`metrics.distinct`]). To find itself alone is
    too easy: a radius may do so whose top tens are full of hubs. Each setting is tried as it is and with hubs
    corrected by the other drawn queries; the correction is taken only where it does better. Among equally good radii
    the middle one is taken: the edges of a plateau are where it ends.

    Self-retrieval tells good radii from bad ones, but directions only where the plain gradient fails at it: who can
    afford to train the model again on some subsets of the candidates gives what came out as `retrained`, and the
    measure is the linear datamodeling score ([`metrics.lds`]).

    Args:
        attributor (`ForwardInf`): Its model, adapter and other ascent options are used.
        candidates (`datasets.Dataset`): Where queries and candidates are drawn from.
        radii (`Sequence[float]`, *optional*): Radii to try. Defaults to .1, .3, 1, 3 and 10, or a thousandth of these
            where they are relative.
        steps (`Sequence[int]`): Numbers of steps to try.
        directions (`Sequence[str]`, *optional*): Directions to try ([`AscentConfig`]), of equally good ones the first.
            Defaults to the attributor's own alone.
        dampings (`Sequence[float]`, *optional*): Dampings to try of every direction that has one. Defaults to the
            attributor's own, or for other directions to theirs.
        retrained (`Retrained`, *optional*): What retraining on subsets of all candidates did to some queries.
        queries (`int`, defaults to 30): Candidates drawn as queries.
        pool (`int`, defaults to 1024): Candidates they are ranked among, at most.
        seed (`int`, *optional*): Draws both. Defaults to the ascent's seed.

    Raises:
        ValueError: If there are fewer than 2 candidates, or no setting retrieves or foretells anything.
    """
    if len(candidates) < 2:
        raise ValueError(f"Tuning needs at least 2 candidates to tell apart, not {len(candidates)}.")
    if retrained is None:
        draw = np.random.default_rng(attributor.ascent.seed if seed is None else seed).permutation(len(candidates))
        columns = attributor.adapter.columns_in(candidates.column_names)
        judge = _self_retrieval(columns, candidates, draw[:pool], draw[: min(queries, pool)])
    else:
        judge = _retraining(retrained, candidates)
    tracer = attributor if attributor.training is not None else attributor.with_options(training=candidates)
    radii = radii or (RELATIVE_RADII if attributor.ascent.relative else RADII)
    settings, trials = [], []
    for ascent in _settings(attributor.ascent, directions, dampings, steps, radii):
        scores = tracer.with_options(ascent=ascent).score(judge.queries, judge.candidates)
        for hubs in (False, True) if retrained is None and len(scores) > 2 else (False,):
            found = _corrected_by_each_other(scores) if hubs else scores
            shown = {name: getattr(ascent, name) for name in ("direction", "damping", "radius", "steps")}
            trials.append({**shown, "hubs": hubs, **judge.judge(found), "chosen": False})
            settings.append(ascent)
    best = _choose(trials)
    trials[best]["chosen"] = True
    return Tuning(settings[best], judge.queries if trials[best]["hubs"] else None, trials)


def _settings(
    ascent: AscentConfig,
    directions: Sequence[str] | None,
    dampings: Sequence[float] | None,
    steps: Sequence[int],
    radii: Sequence[float],
) -> Iterator[AscentConfig]:
    """Every combination, the attributor's other options kept."""
    plain = replace(ascent, learning_rate=None, optimizer="sgd", radius=1.0)
    for direction in directions or (ascent.direction,):
        turned = plain if direction == ascent.direction else plain.along(cast(str, direction))
        for damping in (turned.damping,) if direction == "gradient" else dampings or (turned.damping,):
            for k in steps:
                yield from (replace(turned, damping=damping, steps=k, radius=radius) for radius in radii)


def _self_retrieval(columns: Sequence[str], candidates: Dataset, pool: np.ndarray, own: np.ndarray) -> _Judge:
    rows = np.sort(pool)
    among = candidates.select(rows).select_columns(list(columns))  # a row asks for itself, against nothing
    drawn = np.sort(np.searchsorted(rows, own))
    texts = list(zip(*(among[column] for column in columns), strict=True))
    selves = [[j for j, text in enumerate(texts) if text == texts[row]] for row in drawn]

    def judge(scores: np.ndarray) -> dict[str, float]:
        return {"self_mrr": float(reciprocal_ranks(scores, selves).mean()), "distinct": distinct(scores)}

    return _Judge(among.select(drawn), among, judge)


def _retraining(retrained: Retrained, candidates: Dataset) -> _Judge:
    def judge(scores: np.ndarray) -> dict[str, float]:
        return {"lds": float(lds_by_query(scores, retrained.subsets, retrained.losses).mean())}

    return _Judge(retrained.queries, candidates, judge)


def _corrected_by_each_other(scores: np.ndarray) -> np.ndarray:
    """Correct each query's hubs by the other queries."""
    others = (np.delete(scores, i, axis=0) for i in range(len(scores)))
    return np.concatenate([correct_hubs(row[None], rest) for row, rest in zip(scores, others, strict=True)])


def _choose(trials: list[dict[str, Any]]) -> int:
    """The best trial: uncorrected before corrected, the first direction, fewer steps, the middle of equal ones."""
    measures = ("lds",) if "lds" in trials[0] else ("self_mrr", "distinct")
    values = [math.prod(trial[measure] for measure in measures) for trial in trials]
    highest = max(values)
    if highest <= 0:
        raise ValueError(
            "No setting retrieves anything: do the candidates' losses have gradients at all?"
            if "lds" not in measures
            else "No setting foretells anything of what retraining did: are subsets and losses in the same order?"
        )
    equal = [i for i, value in enumerate(values) if value >= highest - 1e-9]
    first = {trial["direction"]: i for i, trial in reversed(list(enumerate(trials)))}
    for cost in (
        lambda trial: trial["hubs"],
        lambda trial: first[trial["direction"]],
        lambda trial: trial["steps"],
    ):
        least = min(cost(trials[i]) for i in equal)
        equal = [i for i in equal if cost(trials[i]) == least]
    return sorted(equal, key=lambda i: (trials[i]["damping"] or 0, trials[i]["radius"]))[len(equal) // 2]
