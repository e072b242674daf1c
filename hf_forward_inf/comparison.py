"""Forward-INF beside other attributors, on the same queries and candidates."""

import time
from typing import Any

from hf_forward_inf import cost
from hf_forward_inf.ascent import AscentConfig
from hf_forward_inf.attribution import Attribution, Attributor
from hf_forward_inf.baselines import (
    BM25,
    Cascade,
    Fusion,
    InfluenceFunctions,
    RepresentationSimilarity,
    TracIn,
    TrackStar,
)
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.metrics import random_figures
from hf_forward_inf.processes import say
from hf_forward_inf.task import Task

FIXED_LEARNING_RATES = ((0.1, 1), (1.0, 1), (0.1, 3))
"""Learning rates and steps of the paper's fixed-rate ascent that are tried; the best by its true MRR is reported."""


def run_baselines(task: Task, tracer: ForwardInf) -> dict[str, Attribution]:
    """Trace with BM25, and, where the truth is known to choose by, the paper's fixed learning rates."""
    found = {
        "bm25": BM25().trace(task.queries, task.candidates),
        "bm25_without_answer": BM25(with_answer=False).trace(task.queries, task.candidates),
    }
    if task.proponents is None:
        return found
    tries = []
    for rate, steps in FIXED_LEARNING_RATES:
        say(f"The paper's fixed learning rate {rate:g}, {steps} step{'s' if steps > 1 else ''}, all parameters ...")
        config = AscentConfig(learning_rate=rate, steps=steps, modules=["all"], seed=tracer.ascent.seed)
        tries.append(tracer.with_options(ascent=config, references=None).trace(task.queries, task.candidates))
    truth = task.proponents
    best = max(tries, key=lambda one: one.evaluate(truth)["mrr"])
    return {"fixed_learning_rate": best, **found}


def run_comparison(task: Task, tracer: ForwardInf) -> tuple[dict[str, Attribution], dict[str, float]]:
    """Trace with every other attributor, and time each, Forward-INF too, with nothing taken from the cache.

    Returns:
        `tuple`: Attributions by name, and `{name}/seconds` with, for all queries together, `{name}/forward_passes`:
        seconds / those of one plain forward pass over the candidates.
    """
    parts: dict[str, Any] = {"adapter": tracer.adapter, "cache_dir": tracer.cache_dir}
    attributors: dict[str, Attributor] = {
        "forward_inf": tracer,
        "tracin_dot": TracIn(**parts),
        "tracin_cosine": TracIn(similarity="cosine", **parts),
        "trackstar": TrackStar(**parts),
        "representation": RepresentationSimilarity(**parts),
        "influence_functions": InfluenceFunctions(**parts),
        "bm25+forward_inf": Fusion([BM25(), tracer]),
        "bm25>forward_inf": Cascade(BM25(), tracer),
    }
    found, costs = {}, {}
    with cost.uncached():
        plain = cost.seconds_of_a_plain_pass(tracer, task.candidates)
        for name, attributor in attributors.items():
            say(f"{name} ...")
            start = time.perf_counter()
            found[name] = attributor.trace(task.queries, task.candidates)
            costs[f"{name}/seconds"] = time.perf_counter() - start
            costs[f"{name}/forward_passes"] = costs[f"{name}/seconds"] / plain
    found.pop("forward_inf")
    return found, costs


def evaluate_all(found: dict[str, Attribution], task: Task) -> dict[str, dict[str, float]]:
    """Compare every attributor with the truth, a random order beside them; nothing where it is unknown."""
    if task.proponents is None:
        return {}
    table = {method: attribution.evaluate(task.proponents) for method, attribution in found.items()}
    for method, attribution in found.items():
        if attribution.config.get("learning_rate"):
            table[method] |= {key: attribution.config[key] for key in ("learning_rate", "steps")}
    sizes = [len(rows) for rows in task.proponents]
    return {**table, "random": random_figures(len(task.candidates), sizes)}


def as_table(table: dict[str, dict[str, float]], metrics: dict[str, Any]) -> str:
    """Lay the main figures out for a terminal; passes are those over the candidates, for all queries."""
    columns = ["mrr", "precision@1", "recall@1", "recall@5", "recall@10"]
    width = max(map(len, table))
    timed = any(f"{method}/forward_passes" in metrics for method in table)
    heads = "".join(f"{name:>13}" for name in columns[1:]) + (f"{'passes':>13}" if timed else "")
    lines = [f"{'':{width}}  {'mrr (s.e.)':>13}{heads}"]
    for method, figures in table.items():
        error = f" ({figures['mrr_se']:.3f})" if "mrr_se" in figures else " " * 8
        rest = "".join(f"{figures[name]:13.3f}" if name in figures else " " * 13 for name in columns[1:])
        passes = metrics.get(f"{method}/forward_passes")
        lines.append(f"{method:{width}}  {figures['mrr']:5.3f}{error}{rest}" + (f"{passes:13.1f}" if passes else ""))
    return "\n".join(lines)
