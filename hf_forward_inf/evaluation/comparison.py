"""Trace with every attributor on the same queries and candidates, and measure times."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attribution, Attributor
from hf_forward_inf.baselines import Cascade, attributors_for
from hf_forward_inf.evaluation import cost
from hf_forward_inf.evaluation.tables import REFERENCE, mrr_after
from hf_forward_inf.evaluation.task import Task
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.utils.fingerprints import uncached
from hf_forward_inf.utils.processes import say

FIXED_LEARNING_RATES = ((0.1, 1), (1.0, 1), (0.1, 3))
"""Learning rates and numbers of steps of the paper's fixed-rate ascent that are tried."""
FIXED_RATE_QUERIES = 14
"""Number of queries on which the best of them is chosen by its MRR: one block, all parameters perturbed."""
MOMENTS = 40
"""Number of points on a time-budget curve."""


def run_baselines(task: Task, tracer: ForwardInf) -> dict[str, Attribution]:
    """Trace with BM25 and, if proponents are known, with the best of the paper's fixed learning rates.

    A baseline that fails is left out, and the reason is printed.
    """
    found = {}
    for name, one in attributors_for(tracer, ("bm25", "bm25_without_answer")).items():
        try:
            found[name] = one.trace(task.queries, task.candidates)
        except Exception as error:
            _say_left_out(name, error)
    if task.proponents is None:
        return found
    say("The paper's fixed learning rate, all parameters ...")
    fixed = fixed_learning_rate(tracer, task.queries, task.candidates, task.proponents)
    return {"fixed_learning_rate": fixed, **found}


def fixed_learning_rate(
    tracer: ForwardInf,
    queries: Dataset,
    candidates: Dataset,
    truth: Sequence[Sequence[int]],
    tries: Sequence[tuple[float, int]] = FIXED_LEARNING_RATES,
) -> Attribution:
    """Trace with the best of several fixed learning rates on all parameters, as in the paper.

    Args:
        tracer (`ForwardInf`): Its model and seed are used.
        queries (`datasets.Dataset`): The queries.
        candidates (`datasets.Dataset`): The candidates.
        truth (`list[list[int]]`): Each query's proponents. The rate is chosen by those of the first
            [`FIXED_RATE_QUERIES`] queries, which favours it in a comparison.
        tries (`list[tuple[float, int]]`, *optional*): Learning rates, and numbers of steps.
    """
    few = range(min(FIXED_RATE_QUERIES, len(queries)))
    mrr = {}
    for rate, steps in tries:
        ascent = AscentConfig(learning_rate=rate, steps=steps, modules=["all"], seed=tracer.ascent.seed)
        fixed = tracer.with_options(ascent=ascent, references=None)
        mrr[fixed] = fixed.trace(queries.select(few), candidates).evaluate([truth[i] for i in few])["mrr"]
    return max(mrr, key=lambda fixed: mrr[fixed]).trace(queries, candidates)


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Args:
        found (`dict[str, Attribution]`): Attributions by attributor.
        costs (`dict[str, float]`): For each attributor `{name}/seconds_alone` for one query and `_together` for all
            queries; `{name}/forward_passes_alone`, `_together`, the same in plain forward passes over the candidates;
            `{name}/peak_memory_ratio` to plain inference; `{name}/mrr_in_budget_alone`, `_together`, its mean MRR over
            the time that Forward-INF takes.
        curves (`dict[str, dict]`): `alone` and `together`: for each attributor the MRR at `moments`, in plain forward
            passes over the candidates.
    """

    found: dict[str, Attribution]
    costs: dict[str, float]
    curves: dict[str, dict[str, Any]]


def run_comparison(task: Task, tracer: ForwardInf) -> Comparison:
    """Trace with every attributor without the cache, for the first query alone and for all queries together.

    A baseline that fails is left out, and the reason is printed.
    """
    paces: dict[str, dict[str, cost.Pace]] = {"alone": {}, "together": {}}
    found, costs = {}, {}
    plain, plain_peak = cost.plain_pass(tracer, task.candidates)
    everyone = attributors_for(tracer, training=task.candidates)
    one = task.queries.select([0])
    for name, attributor in list(everyone.items()):
        try:
            _, alone, _ = cost.pace(attributor.trace, one, task.candidates, _setup_of_cascade(attributor, one, task))
            setup = _setup_of_cascade(attributor, task.queries, task)
            found[name], together, peak = cost.pace(attributor.trace, task.queries, task.candidates, setup)
        except Exception as error:
            if name == REFERENCE:
                raise
            _say_left_out(name, error)
            del everyone[name]
            continue
        paces["alone"][name], paces["together"][name] = alone, together
        say(f"{name}: {alone.seconds / plain:.1f} passes for a query, {together.seconds / plain:.1f} for all.")
        if peak:
            costs[f"{name}/peak_memory_ratio"] = peak / plain_peak
        for kind in paces:
            costs[f"{name}/seconds_{kind}"] = paces[kind][name].seconds
            costs[f"{name}/forward_passes_{kind}"] = paces[kind][name].seconds / plain
    curves: dict[str, dict[str, Any]] = {}
    if task.proponents is not None:
        truth = [task.proponents[i] for i in task.main]
        for kind in paces:
            through = paces[kind]["forward_inf"].seconds
            moments = np.linspace(0, 2 * through, 2 * MOMENTS + 1)
            curves[kind] = {"moments": moments / plain}
            for name, attributor in everyone.items():
                order = _order(attributor, task)[task.main]
                curve = mrr_after(moments, found[name].scores[task.main], truth, order, paces[kind][name])
                curves[kind][name] = curve
                costs[f"{name}/mrr_in_budget_{kind}"] = float(curve[1 : MOMENTS + 1].mean())
    return Comparison(found, costs, curves)


def _say_left_out(name: str, error: Exception) -> None:
    say(f"{name} failed and is left out: {error} ({type(error).__name__}).")


def _setup_of_cascade(attributor: Attributor, queries: Dataset, task: Task) -> float | None:
    """Return a cascade's setup, measured with `keep=1`: it scores the same number of candidates from any pool."""
    if not isinstance(attributor, Cascade):
        return None
    least = Cascade(attributor.cheap, attributor.expensive, keep=1)
    with uncached():
        return cost.timed(lambda: least.trace(queries, task.candidates))[0]


def _order(attributor: Attributor, task: Task) -> np.ndarray:
    """Return the order in which candidates are scored: best first for a cascade, else a random one."""
    if isinstance(attributor, Cascade):
        first = attributor.cheap.trace(task.queries, task.candidates, top_k=attributor.keep).indices
        assert first is not None
        return first
    order = np.random.default_rng(0).permutation(len(task.candidates))
    return np.broadcast_to(order, (len(task.queries), len(order)))
