"""What is compared on drawings: directions of Forward-INF, baselines, and controls that never look at a query."""

from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.ascent import AscentConfig
from hf_forward_inf.attribution import Attribution, Attributor
from hf_forward_inf.baselines import BM25, FirstOrder, RepresentationSimilarity, TracIn
from hf_forward_inf.baselines.pixels import PixelDistance
from hf_forward_inf.experiments.exemplars import CAPTION, IMAGE, as_queries
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.loss_pass import LossPass
from hf_forward_inf.modes import evaluating

FIXED_LEARNING_RATES = (0.01, 0.1, 1.0)
"""The paper's fixed rates that are tried; the best by its true MRR is reported."""


def drawing_ascent(ascent: AscentConfig, relative_radius: float) -> AscentConfig:
    """Tell the radius relative to the norm of the parameters that move, unless there is a learning rate."""
    return ascent if ascent.learning_rate is not None else replace(ascent, radius=relative_radius, relative=True)


def traced(tracer: ForwardInf, queries: Dataset, candidates: Dataset) -> dict[str, Attribution]:
    """Trace along the tracer's direction and along the plain gradient, standardised over the queries and not."""
    corrected = tracer.trace(queries, candidates)
    gradient = along_the_gradient(tracer).trace(queries, candidates)
    return {"forward_inf": corrected.standardised(), "unstandardised": corrected, **_both("gradient", gradient)}


def along_the_gradient(tracer: ForwardInf) -> ForwardInf:
    """Give a tracer whose step is as long, but goes along the plain gradient."""
    return tracer.with_options(ascent=tracer.ascent.along("gradient"))


def controls(
    before: DiffusionAdapter, adapter: DiffusionAdapter, queries: Dataset, candidates: Dataset
) -> dict[str, Attribution]:
    """Compare pictures and captions, and rank without a look at the query.

    `low_loss` is -L(theta), `learned` how much the loss of a candidate fell as the model was taught.
    """
    with evaluating(before.model, adapter.model):
        first, now = (LossPass(one, candidates).base() for one in (before, adapter))
    blind = {
        name: Attribution(np.tile(scores, (len(queries), 1)), queries, candidates, method=name)
        for name, scores in {"low_loss": -now, "learned": first - now}.items()
    }
    seen: dict[str, Attributor] = {
        "pixel_distance": PixelDistance(adapter),
        "representation": RepresentationSimilarity(adapter=adapter),
        "bm25": BM25(input_column=CAPTION),
    }
    return {**{name: other.trace(queries, candidates) for name, other in seen.items()}, **blind}


def baselines(
    tracer: ForwardInf, queries: Dataset, candidates: Dataset, truth: list[list[int]]
) -> dict[str, Attribution]:
    """Trace with what needs candidates' gradients, a choice by the truth, or the truth itself.

    TracIn, and influence functions along the tracer's direction, standardised as well; the paper's fixed learning
    rate, the best of several; and the proponents' own pictures as the queries.
    """
    parts: dict[str, Any] = {"adapter": tracer.adapter, "cache_dir": tracer.cache_dir}
    dot = TracIn(**parts).trace(queries, candidates)
    cosine = TracIn(similarity="cosine", **parts).trace(queries, candidates)
    first_order = FirstOrder(ascent=tracer.ascent, **parts).trace(queries, candidates)
    pictures = [candidates.select(rows)[IMAGE][:] for rows in truth]
    itself = tracer.trace(as_queries(queries[CAPTION][:], pictures), candidates)
    return {
        **_both("tracin", dot),
        **_both("tracin_cosine", cosine),
        **_both("influence_functions", first_order),
        "fixed_learning_rate": fixed_learning_rate(tracer, queries, candidates, truth),
        **_both("exemplar_as_query", replace(itself, queries=queries)),
    }


def fixed_learning_rate(
    tracer: ForwardInf, queries: Dataset, candidates: Dataset, truth: list[list[int]]
) -> Attribution:
    """Trace with the paper's fixed learning rate, the best of several by the truth."""
    tries = [
        tracer.with_options(
            ascent=AscentConfig(learning_rate=rate, modules=tracer.ascent.modules, seed=tracer.ascent.seed)
        ).trace(queries, candidates)
        for rate in FIXED_LEARNING_RATES
    ]
    return max(tries, key=lambda found: found.evaluate(truth)["mrr"])


def _both(name: str, found: Attribution) -> dict[str, Attribution]:
    return {name: found, f"{name}_standardised": found.standardised()}
