"""Choose the ascent's settings without labels, by self-retrieval (as in Algorithm 1) or by retraining."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast

import numpy as np
from datasets import Dataset

from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.scores.corrections import correct_hubs
from hf_forward_inf.scores.metrics import distinct, lds_by_query, reciprocal_ranks
from hf_forward_inf.scores.retraining import Retrained
from hf_forward_inf.utils.text_tables import text_table

RADII, RELATIVE_RADII = (0.1, 0.3, 1.0, 3.0, 10.0), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Radii tried by default, absolute or relative as the attributor's."""
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
"""Column titles and formats of the table of trials; columns without a value are left out."""


@dataclass(frozen=True)
class Tuning:
    """The result of tuning; `str()` of it is a table of the trials.

    Args:
        best (`AscentConfig`): The settings to use.
        references (`datasets.Dataset`, *optional*): Reference queries, if correcting hubs improved retrieval.
        trials (`list[dict]`): One dictionary a trial: `direction`, `damping`, `radius`, `steps`, `hubs`, then
            `self_mrr` and `distinct`, or `lds`, and `chosen`.
    """

    best: AscentConfig
    references: Dataset | None
    trials: list[dict[str, Any]]

    def __str__(self) -> str:
        shown = {name: form for name, (_, form) in COLUMNS.items() if name in self.trials[0]}
        rows = [["", *(COLUMNS[name][0] for name in shown)]]
        for trial in self.trials:
            values = {**trial, "hubs": "yes" if trial["hubs"] else "no"}
            cells = ("-" if values[name] is None else format(values[name], form) for name, form in shown.items())
            rows.append(["*" if trial["chosen"] else "", *cells])
        return text_table(rows)


@dataclass(frozen=True)
class _Objective:
    """What tuning maximises: the product of some measures of the scores of these queries; 1 at best."""

    queries: Dataset
    candidates: Dataset
    measures: Callable[[np.ndarray], dict[str, float]]


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
    """Choose radius, steps, direction and damping so that training examples, used as queries, retrieve themselves.

    Some candidates are drawn as queries. Under a good setting each ranks first among the candidates, and the top tens
    of different queries differ. The objective is the mean reciprocal rank of the query itself (or of a row equal to
    it) times the share of different candidates among all top tens ([`metrics.distinct`]); the first factor alone can
    be high for a radius whose top tens are full of hubs. Each setting is tried without and with hubs corrected by the
    other drawn queries; the correction is chosen only where it does better. Among equally good radii the middle one
    is chosen, away from both edges of the plateau.

    Self-retrieval separates good radii from bad ones, but directions only where the plain gradient fails to retrieve.
    If you can afford to retrain the model on some subsets of the candidates, pass the results as `retrained`: the
    objective is then the linear datamodeling score ([`metrics.lds`]).

    Args:
        attributor (`ForwardInf`): Supplies the model, the adapter and all other ascent options.
        candidates (`datasets.Dataset`): Where queries and candidates are drawn from.
        radii (`Sequence[float]`, *optional*): Radii to try. Defaults to .1, .3, 1, 3 and 10, or a thousandth of these
            where radii are relative.
        steps (`Sequence[int]`, defaults to `(1,)`): Numbers of steps to try.
        directions (`Sequence[str]`, *optional*): Directions to try ([`AscentConfig`]); of equally good ones the first
            is chosen. Defaults to the attributor's own.
        dampings (`Sequence[float]`, *optional*): Dampings to try with every direction that has one. Defaults to the
            attributor's own for its own direction, to the default damping for another one.
        retrained (`Retrained`, *optional*): Losses of some queries after retraining on subsets of all candidates.
        queries (`int`, defaults to 30): Candidates drawn as queries.
        pool (`int`, defaults to 1024): Maximum number of candidates that they are ranked among.
        seed (`int`, *optional*): Seed of both draws. Defaults to the ascent's seed.

    Returns:
        [`Tuning`]: The best settings, and all trials.

    Raises:
        ValueError: If there are fewer than 2 candidates, no setting to try, or none that retrieves or predicts
            anything.
    """
    if len(candidates) < 2:
        raise ValueError(f"Tuning needs at least 2 candidates, to rank one above the other, not {len(candidates)}.")
    if retrained is None:
        draw = np.random.default_rng(attributor.ascent.seed if seed is None else seed).permutation(len(candidates))
        columns = attributor.adapter.columns_in(candidates.column_names)
        objective = _self_retrieval(columns, candidates, draw[:pool], draw[: min(queries, pool)])
    else:
        objective = _retraining(retrained, candidates)
    tracer = attributor if attributor.training is not None else attributor.with_options(training=candidates)
    if radii is None:
        radii = RELATIVE_RADII if attributor.ascent.relative else RADII
    settings, trials = [], []
    for ascent in _settings(attributor.ascent, directions, dampings, steps, radii):
        scores = tracer.with_options(ascent=ascent).score(objective.queries, objective.candidates)
        for hubs in (False, True) if retrained is None and len(scores) > 2 else (False,):
            found = _corrected_by_each_other(scores) if hubs else scores
            shown = {name: getattr(ascent, name) for name in ("direction", "damping", "radius", "steps")}
            trials.append({**shown, "hubs": hubs, **objective.measures(found), "chosen": False})
            settings.append(ascent)
    if not trials:
        raise ValueError("No settings to try: radii, steps, directions and dampings need at least one value each.")
    best = _choose(trials)
    trials[best]["chosen"] = True
    return Tuning(settings[best], objective.queries if trials[best]["hubs"] else None, trials)


def _settings(
    ascent: AscentConfig,
    directions: Sequence[str] | None,
    dampings: Sequence[float] | None,
    steps: Sequence[int],
    radii: Sequence[float],
) -> Iterator[AscentConfig]:
    """Yield every combination of the values; the attributor's other options stay as they are."""
    own = replace(ascent, learning_rate=None, trust=None, optimizer="sgd", radius=1.0)
    for direction in (ascent.direction,) if directions is None else directions:
        start = own if direction == ascent.direction else own.along(cast(str, direction))
        undamped = direction == "gradient"
        tried = (start.damping,) if undamped or dampings is None else dampings
        for damping, k, radius in product(tried, steps, radii):
            yield replace(start, damping=damping, steps=k, radius=radius)


def _self_retrieval(columns: Sequence[str], candidates: Dataset, pool: np.ndarray, own: np.ndarray) -> _Objective:
    """Return the objective that drawn rows (`own`) rank first, or rows equal to them, in a `pool` of candidates."""
    rows = np.sort(pool)
    among = candidates.select(rows).select_columns(list(columns))  # without a contrast: a row is its own query
    drawn = np.sort(np.searchsorted(rows, own))
    texts = list(zip(*(among[column] for column in columns), strict=True))
    equal = [[j for j, text in enumerate(texts) if text == texts[row]] for row in drawn]

    def measures(scores: np.ndarray) -> dict[str, float]:
        return {"self_mrr": float(reciprocal_ranks(scores, equal).mean()), "distinct": distinct(scores)}

    return _Objective(among.select(drawn), among, measures)


def _retraining(retrained: Retrained, candidates: Dataset) -> _Objective:
    """Return the objective that scores predict the losses after retraining."""

    def measures(scores: np.ndarray) -> dict[str, float]:
        return {"lds": float(lds_by_query(scores, retrained.subsets, retrained.losses).mean())}

    return _Objective(retrained.queries, candidates, measures)


def _corrected_by_each_other(scores: np.ndarray) -> np.ndarray:
    """Correct each query's scores for hubs, with the other queries as references."""
    others = (np.delete(scores, i, axis=0) for i in range(len(scores)))
    return np.concatenate([correct_hubs(row[None], rest) for row, rest in zip(scores, others, strict=True)])


def _choose(trials: list[dict[str, Any]]) -> int:
    """Return the index of the best trial.

    Among equally good ones: uncorrected before corrected, the direction tried first, fewer steps, the middle radius.
    """
    measures = ("lds",) if "lds" in trials[0] else ("self_mrr", "distinct")
    values = [math.prod(trial[measure] for measure in measures) for trial in trials]
    highest = max(values)
    if highest <= 0:
        raise ValueError(
            "No setting retrieves anything: do the candidates' losses have gradients?"
            if "lds" not in measures
            else "No setting predicts the losses after retraining: are subsets and losses in the same order?"
        )
    order = [trial["direction"] for trial in trials]

    def key(trial: dict[str, Any]) -> tuple[bool, int, int]:
        return trial["hubs"], order.index(trial["direction"]), trial["steps"]

    equal = [i for i, value in enumerate(values) if value >= highest - 1e-9]
    simplest = min(key(trials[i]) for i in equal)
    left = [i for i in equal if key(trials[i]) == simplest]
    return sorted(left, key=lambda i: (trials[i]["damping"] or 0, trials[i]["radius"]))[len(left) // 2]
