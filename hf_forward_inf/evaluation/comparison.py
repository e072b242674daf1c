"""Every attributor on the same queries and candidates, timed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attribution, Attributor
from hf_forward_inf.baselines import Cascade, attributors_for
from hf_forward_inf.evaluation import cost
from hf_forward_inf.evaluation.tables import mrr_after
from hf_forward_inf.evaluation.task import Task
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.utils.fingerprints import uncached
from hf_forward_inf.utils.processes import say

FIXED_LEARNING_RATES = ((0.1, 1), (1.0, 1), (0.1, 3))
"""Learning rates and steps of the paper's fixed-rate ascent that are tried."""
FIXED_RATE_QUERIES = 14
"""The best of them by its true MRR on so many queries is reported: one block, all parameters perturbed."""
MOMENTS = 40
"""Points of a time-budget curve."""


def run_baselines(task: Task, tracer: ForwardInf) -> dict[str, Attribution]:
    """Trace with BM25, and, where the truth is known to choose by, the paper's fixed learning rates."""
    cheap = attributors_for(tracer, ("bm25", "bm25_without_answer"))
    found = {name: one.trace(task.queries, task.candidates) for name, one in cheap.items()}
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
    """Trace with the paper's fixed learning rate on all parameters, the best of several.

    Args:
        tracer (`ForwardInf`): Whose model and seed it takes.
        queries (`datasets.Dataset`): All of them.
        candidates (`datasets.Dataset`): The candidates.
        truth (`list[list[int]]`): Each query's proponents; by them it chooses, on the first [`FIXED_RATE_QUERIES`].
        tries (`list[tuple[float, int]]`, *optional*): Learning rates and steps.
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
    """What a comparison measured.

    Args:
        found (`dict[str, Attribution]`): By attributor.
        costs (`dict[str, float]`): By attributor: `{name}/seconds_alone` for one query and `_together` for all of
            them, the same as `forward_passes` over the candidates, `{name}/peak_memory_ratio` to plain inference, and
            `{name}/mrr_in_budget_alone`, `_together`: the MRR that it has on average until Forward-INF is through.
        curves (`dict[str, dict]`): `alone` and `together`: by attributor, MRR after each of `moments`, which are
            counted in plain forward passes over the candidates.
    """

    found: dict[str, Attribution]
    costs: dict[str, float]
    curves: dict[str, dict[str, Any]]


def run_comparison(task: Task, tracer: ForwardInf) -> Comparison:
    """Trace with every attributor, for the first query alone and for all together, nothing taken from the cache."""
    paces: dict[str, dict[str, cost.Pace]] = {"alone": {}, "together": {}}
    found, costs = {}, {}
    plain, plain_peak = cost.plain_pass(tracer, task.candidates)
    everyone = attributors_for(tracer, training=task.candidates)
    one = task.queries.select([0])
    for name, attributor in everyone.items():
        _, alone, _ = cost.pace(attributor.trace, one, task.candidates, _setup_of_cascade(attributor, one, task))
        setup = _setup_of_cascade(attributor, task.queries, task)
        found[name], together, peak = cost.pace(attributor.trace, task.queries, task.candidates, setup)
        paces["alone"][name], paces["together"][name] = alone, together
        say(f"{name}: {alone.seconds / plain:.1f} passes for a query, {together.seconds / plain:.1f} for all.")
        if peak:
            costs[f"{name}/peak_memory_ratio"] = peak / plain_peak
        for kind in paces:
            costs[f"{name}/seconds_{kind}"] = paces[kind][name].seconds
            costs[f"{name}/forward_passes_{kind}"] = paces[kind][name].seconds / plain
    curves: dict[str, dict[str, Any]] = {}
    if task.proponents is not None:
        rows = task.groups[""]
        truth = [task.proponents[i] for i in rows]
        for kind in paces:
            through = paces[kind]["forward_inf"].seconds
            moments = np.linspace(0, 2 * through, 2 * MOMENTS + 1)
            curves[kind] = {"moments": moments / plain}
            for name, attributor in everyone.items():
                order = _order(attributor, task)[rows]
                curve = mrr_after(moments, found[name].scores[rows], truth, order, paces[kind][name])
                curves[kind][name] = curve
                costs[f"{name}/mrr_in_budget_{kind}"] = float(curve[1 : MOMENTS + 1].mean())
    return Comparison(found, costs, curves)


def _setup_of_cascade(attributor: Attributor, queries: Dataset, task: Task) -> float | None:
    """A cascade inspects as many candidates of any number, so that its setup is measured by inspecting one."""
    if not isinstance(attributor, Cascade):
        return None
    least = Cascade(attributor.cheap, attributor.expensive, keep=1)
    with uncached():
        return cost.timed(lambda: least.trace(queries, task.candidates))[0]


def _order(attributor: Attributor, task: Task) -> np.ndarray:
    """The order in which candidates are inspected: a cascade's is best first, all others share a random one."""
    if isinstance(attributor, Cascade):
        first = attributor.cheap.trace(task.queries, task.candidates, top_k=attributor.keep).indices
        assert first is not None
        return first
    order = np.random.default_rng(0).permutation(len(task.candidates))
    return np.broadcast_to(order, (len(task.queries), len(order)))
