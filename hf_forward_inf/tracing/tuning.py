"""Choose the ascent's settings by retraining, which measures truth, or self-retrieval, which measures retrieval."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.data.inputs import as_dataset, read_inputs
from hf_forward_inf.scores.metrics import distinct, reciprocal_ranks
from hf_forward_inf.scores.retraining import Retrained, lds_by_query
from hf_forward_inf.tracing.halves import TrainModel, retrained_on_halves
from hf_forward_inf.utils.text_tables import text_table

LENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Lengths tried by default, as multiples of the attributor's own."""
OPTIONS = ("direction", "damping", "iterations", "radius", "trust", "learning_rate", "steps")
"""Options of the ascent that are shown of every trial, besides those that differ."""
MEASURES = {"self_mrr": "self-retrieval MRR", "distinct": "distinct in top 10", "lds": "LDS"}


@dataclass(frozen=True)
class Tuning:
    """The result of tuning; `str()` of it is a table of the trials.

    Args:
        best (`AscentConfig`): The settings to use.
        trials (`list[dict]`): One dictionary a trial: options of the ascent, then `lds`, or `self_mrr` and `distinct`,
            and `chosen`.
    """

    best: AscentConfig
    trials: list[dict[str, Any]]

    def __str__(self) -> str:
        shown = [name for name in self.trials[0] if name != "chosen" and any(t[name] is not None for t in self.trials)]
        rows = [["", *(MEASURES.get(name, name) for name in shown)]]
        for trial in self.trials:
            rows.append(["*" if trial["chosen"] else "", *(_cell(name, trial[name]) for name in shown)])
        return text_table(rows)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    return format(value, ".3f") if name in MEASURES else format(value, "g") if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class _Objective:
    """What tuning maximises: the product of some measures of the scores of these queries; 1 at best."""

    queries: Dataset
    candidates: Dataset
    measures: Callable[[np.ndarray], dict[str, float]]
    failed: str
    """The error where no setting is above 0."""


def tune(
    attributor: Scorer,
    candidates: Dataset,
    ascents: Sequence[AscentConfig] | None = None,
    *,
    retrained: Retrained | None = None,
    halves: int | None = None,
    train: TrainModel | None = None,
    queries: Dataset | None = None,
    epochs: int = 5,
    drawn: int = 30,
    pool: int = 1024,
    seed: int | None = None,
) -> Tuning:
    """Choose among settings of the ascent, by one of two measures.

    **By retraining**: the linear datamodeling score ([`retraining.lds`]), that is, how well scores predict the losses
    of some queries after training on subsets of the candidates. Pass losses that you have as `retrained`, or let
    `halves` random halves be trained on by your own function, `train(model, rows, epochs)`. It may go on from the
    trained model (at the peak learning rate, which then falls) or begin from random weights, which is more expensive
    and more exact:

    - the digits and a perceptron, six settings with an LDS of .30 to .78: 8 halves chose the best, from random weights
      and from the model with a quarter of the training's steps; with 5 epochs at a constant rate, whose noise drowns
      what the halves differ in, one with .68;
    - a conv net and 1,000 images: a few halves with 5 further epochs .536, where the best has .542; a Llama and 600
      sentences, 3 epochs: .761 of .789;
    - 6 to 10 halves from random weights are .003 to .02 below the best.

    The cost is printed before it is spent: `halves` x `epochs` / 2 epochs of training on all candidates, and one trace
    of the queries for every setting. The losses of each half are cached: an interrupted run resumes.

    **By self-retrieval**, without `retrained` and `halves`: some candidates are drawn as queries, and should retrieve
    themselves. The measure is the mean reciprocal rank of the query itself (or of a row equal to it) times the share
    of different candidates among all top tens ([`metrics.distinct`]). It finds steps so short or so long that nothing
    is retrieved, and says nothing of truth: on that conv net it chose settings with .43 and .32 of .542, on
    the perceptron the best.

    Args:
        attributor (`ForwardInf`): Supplies the model, the adapter and the defaults of unset options.
        candidates (`datasets.Dataset`): The training data.
        ascents (`Sequence[AscentConfig]`, *optional*): Settings to choose from; of equally good ones the middle one is
            chosen. Defaults to the attributor's own, with .1, .3, 1, 3 and 10 times its length.
        retrained (`Retrained`, *optional*): Losses of some queries after training on subsets of all candidates.
        halves (`int`, *optional*): Random halves of the candidates to train on; 6 to 10 are enough.
        train (`Callable`, *optional*): For `halves`: given a copy of the model, the rows of a half and `epochs`,
            trains it in place, or returns another model.
        queries (`datasets.Dataset`, *optional*): For `halves`: rows that the model was not trained on, such as the
            outputs to explain; 20 to 40 of them.
        epochs (`int`, defaults to 5): For `halves`: passed to `train`.
        drawn (`int`, defaults to 30): For self-retrieval: candidates drawn as queries.
        pool (`int`, defaults to 1024): For self-retrieval: maximum number of candidates that they are ranked among.
        seed (`int`, *optional*): Seed of all draws. Defaults to the ascent's.

    Returns:
        [`Tuning`]: The best settings, and all trials.

    Raises:
        ValueError: If there are fewer than 2 candidates, no settings, none that retrieves or predicts anything, or
            `halves` lacks `train` or `queries`.
    """
    adapter, seed = attributor.adapter, attributor.ascent.seed if seed is None else seed
    if halves is None:
        candidates = as_dataset(candidates, "candidates")
        if train is not None or queries is not None:
            raise ValueError("train and queries are for retraining: give halves=8 with them.")
    elif train is None or queries is None or retrained is not None:
        raise ValueError(
            "halves needs train=..., a function that trains the model on some rows, and queries=..., rows that it was "
            "not trained on, and excludes retrained."
        )
    else:
        queries, candidates = read_inputs(adapter, queries, candidates)
    if len(candidates) < 2:
        raise ValueError(f"Tuning needs at least 2 candidates, to rank one above the other, not {len(candidates)}.")
    settings = _lengths(attributor.ascent) if ascents is None else _completed(attributor, ascents)
    if not settings:
        raise ValueError("No settings to try: ascents is empty.")
    if train is not None and queries is not None and halves is not None:
        asked = adapter.with_answers(queries) if adapter.answers_queries else queries
        retrained = retrained_on_halves(attributor, asked, candidates, train, halves, epochs, seed, len(settings))
    objective = (
        _self_retrieval(attributor, candidates, pool, drawn, seed)
        if retrained is None
        else _retraining(retrained, candidates)
    )
    tracer = attributor if attributor.training is not None else attributor.with_options(training=candidates)
    trials = [_trial(tracer.with_options(ascent=ascent), objective, settings) for ascent in settings]
    best = _best([math.prod(trial[name] for name in MEASURES if name in trial) for trial in trials])
    if best is None:
        raise ValueError(objective.failed)
    trials[best]["chosen"] = True
    return Tuning(settings[best], trials)


def _trial(tracer: Scorer, objective: _Objective, settings: Sequence[AscentConfig]) -> dict[str, Any]:
    scores = tracer.score(objective.queries, objective.candidates)
    return {**_shown(tracer.ascent, settings), **objective.measures(scores), "chosen": False}


def _lengths(ascent: AscentConfig) -> list[AscentConfig]:
    """Return settings that differ in their length alone."""
    name = next(name for name in ("trust", "learning_rate", "radius") if getattr(ascent, name) is not None)
    return [replace(ascent, **{name: factor * getattr(ascent, name)}) for factor in LENGTHS]


def _completed(attributor: Scorer, ascents: Sequence[AscentConfig]) -> list[AscentConfig]:
    return [ascent.completed(attributor.adapter.default_ascent) for ascent in ascents]


def _shown(ascent: AscentConfig, settings: Sequence[AscentConfig]) -> dict[str, Any]:
    """Return the options in which trials differ, and those that are always shown."""
    options = asdict(ascent)
    first = asdict(settings[0])
    differ = [name for name in options if any(asdict(one)[name] != first[name] for one in settings)]
    return {name: options[name] for name in dict.fromkeys((*OPTIONS, *differ))}


def _self_retrieval(attributor: Scorer, candidates: Dataset, pool: int, drawn: int, seed: int) -> _Objective:
    """Return the objective that drawn rows rank first, or rows equal to them, in a pool of candidates."""
    draw = np.random.default_rng(seed).permutation(len(candidates))
    columns = attributor.adapter.columns_in(candidates.column_names)  # without a contrast: a row is its own query
    rows = np.sort(draw[:pool])
    among = candidates.select(rows).select_columns(list(columns))
    asked = np.sort(np.searchsorted(rows, draw[: min(drawn, pool)]))
    texts = list(zip(*(among[column] for column in columns), strict=True))
    equal = [[j for j, text in enumerate(texts) if text == texts[row]] for row in asked]

    def measures(scores: np.ndarray) -> dict[str, float]:
        return {"self_mrr": float(reciprocal_ranks(scores, equal).mean()), "distinct": distinct(scores)}

    failed = "No setting retrieves anything: do the candidates' losses have gradients?"
    return _Objective(among.select(asked), among, measures, failed)


def _retraining(retrained: Retrained, candidates: Dataset) -> _Objective:
    """Return the objective that scores predict the losses after retraining."""

    def measures(scores: np.ndarray) -> dict[str, float]:
        return {"lds": float(lds_by_query(scores, retrained.subsets, retrained.losses).mean())}

    failed = "No setting predicts the losses after retraining: are subsets and losses in the same order?"
    return _Objective(retrained.queries, candidates, measures, failed)


def _best(values: Sequence[float]) -> int | None:
    """Return the position of the highest value, the middle one of equals; `None` if none is above 0."""
    highest = max(values)
    equal = [i for i, value in enumerate(values) if value >= highest - 1e-9]
    return equal[len(equal) // 2] if highest > 0 else None
