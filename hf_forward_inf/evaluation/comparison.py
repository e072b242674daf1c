"""Trace with every attributor on the same queries and candidates, and measure times."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.baselines import attributors_for
from hf_forward_inf.evaluation import cost
from hf_forward_inf.evaluation.tables import REFERENCE, mrr_after
from hf_forward_inf.evaluation.task import Task
from hf_forward_inf.forward_inf import ForwardInf
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
        fixed = tracer.with_options(ascent=ascent, strategy="full", screen=None, keep=None)
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
    everyone = attributors_for(tracer)
    one = task.queries.select([0])
    for name, attributor in list(everyone.items()):
        try:
            _, alone, _ = cost.pace(attributor.trace, one, task.candidates)
            found[name], together, peak = cost.pace(attributor.trace, task.queries, task.candidates)
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
            for name in everyone:
                order = _order(found[name])[task.main]
                curve = mrr_after(moments, found[name].scores[task.main], truth, order, paces[kind][name])
                curves[kind][name] = curve
                costs[f"{name}/mrr_in_budget_{kind}"] = float(curve[1 : MOMENTS + 1].mean())
    return Comparison(found, costs, curves)


def _say_left_out(name: str, error: Exception) -> None:
    say(f"{name} failed and is left out: {error} ({type(error).__name__}).")


def _order(found: Attribution) -> np.ndarray:
    """Return a random order of the candidates, those first that a screen kept, `[queries, candidates]`."""
    order = np.random.default_rng(0).permutation(len(found.candidates))
    order = np.broadcast_to(order, (len(found), len(order)))
    if found.stage is None:
        return order
    later = ~np.take_along_axis(found.stage, order, axis=1)
    return np.take_along_axis(order, np.argsort(later, axis=1, kind="stable"), axis=1)
