"""Planted rows that are to be found: attributors side by side, with intervals and paired differences."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines import ATTRIBUTORS, FirstOrder, attributors_for
from hf_forward_inf.evaluation.tables import REFERENCE, Table
from hf_forward_inf.scores.intervals import with_interval
from hf_forward_inf.scores.metrics import average_precision

OURS: dict[str, Callable[[ForwardInf], Attributor]] = {
    "forward_inf_full": lambda tracer: tracer.with_options(strategy="full"),
    "forward_inf_gradient_screened": lambda tracer: tracer.with_options(
        falls=1, ascent=AscentConfig(direction="gradient")
    ),
    "forward_inf_risen": lambda tracer: tracer.with_options(falls=0),
    "forward_inf_gradient_risen": lambda tracer: tracer.with_options(
        falls=0, ascent=AscentConfig(direction="gradient")
    ),
    "ekfac": lambda tracer: FirstOrder(adapter=tracer.adapter, ascent=AscentConfig(direction="ekfac")),
}
"""Attributors besides those of the registry: the default step on all candidates; with the default's strategy, the step
along the gradient, all tokens counted, and of both steps the rises of those tokens alone that rise; and influence
functions by EK-FAC."""
COMPARED = (
    "forward_inf", "forward_inf_risen", "forward_inf_gradient_screened", "forward_inf_gradient_risen",
    "tracin_cosine", "tracin", "representation", "bm25", "random",
)  # fmt: skip
"""Attributors that are compared where a planted row is looked for."""


def contenders(
    tracer: ForwardInf, names: Sequence[str], more: Mapping[str, Callable[[ForwardInf], Attributor]] = OURS
) -> dict[str, Attributor]:
    """Return attributors that explain a tracer's model, by name.

    Args:
        tracer (`ForwardInf`): With the model.
        names (`Sequence[str]`): Names in the registry, or in `more`.
        more (`dict[str, Callable]`, *optional*): How others are made. Defaults to [`OURS`].

    Raises:
        ValueError: If a name is not known.
    """
    unknown = [name for name in names if name not in more and name not in ATTRIBUTORS]
    if unknown:
        raise ValueError(f"There is no attributor {unknown[0]!r}. Known are {', '.join([*ATTRIBUTORS, *more])}.")
    known = attributors_for(tracer, [name for name in names if name not in more])
    return {name: more[name](tracer) if name in more else known[name] for name in names if name in {*more, *known}}


def average_precisions(scores: np.ndarray, planted: np.ndarray) -> np.ndarray:
    """Return each query's average precision of the planted rows, `[queries]`.

    Args:
        scores (`np.ndarray`): Scores, `[queries, candidates]`.
        planted (`np.ndarray`): Booleans, `[candidates]`.
    """
    rows = np.flatnonzero(planted).tolist()
    return np.array([average_precision(one, rows) for one in scores])


def set_means(scores: np.ndarray, size: int) -> np.ndarray:
    """Return the mean scores of disjoint sets of queries, `[sets, candidates]`; queries that fill no set are left out.

    Args:
        scores (`np.ndarray`): Scores, `[queries, candidates]`.
        size (`int`): Queries of a set; with fewer queries, all are one set.
    """
    size = min(size, len(scores))
    return np.stack([scores[start : start + size].mean(0) for start in range(0, len(scores) - size + 1, size)])


def with_intervals(values: Mapping[str, Mapping[str, np.ndarray]], reference: str = REFERENCE) -> Table:
    """Return means over queries, and how far each attributor is behind the reference, with 95% intervals.

    Args:
        values (`dict[str, dict[str, np.ndarray]]`): By attributor and metric, one value a query or set of queries,
            `[queries]`; they are the same for all attributors.
        reference (`str`, defaults to `"forward_inf"`): The attributor that all others are compared with.

    Returns:
        `dict`: `{metric}` with `_low` and `_high`, and `{metric}_behind`, the reference's value minus theirs.
    """
    table: Table = {}
    for name, measured in values.items():
        table[name] = {}
        for metric, found in measured.items():
            table[name] |= with_interval(metric, found)
            if name != reference and reference in values:
                table[name] |= with_interval(f"{metric}_behind", values[reference][metric] - found)
    return table


def together(parts: Sequence[Mapping[str, Mapping[str, np.ndarray]]]) -> dict[str, dict[str, Any]]:
    """Return the values of several models' queries as one set of queries."""
    return {
        name: {metric: np.concatenate([part[name][metric] for part in parts]) for metric in parts[0][name]}
        for name in parts[0]
    }
