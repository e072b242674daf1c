"""What is compared on drawings: directions of Forward-INF, baselines, and controls that never look at a query."""

from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.attribution import Attribution, Attributor
from hf_forward_inf.baselines import BM25, FirstOrder, RepresentationSimilarity, TracIn
from hf_forward_inf.baselines.denoiser_features import DenoiserFeatures, middle_of
from hf_forward_inf.baselines.pixels import PixelDistance
from hf_forward_inf.evaluation.comparison import fixed_learning_rate
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.toys.drawings import CAPTION, IMAGE, as_queries
from hf_forward_inf.utils.models import evaluating

FISHER_SAMPLE = 256
"""Candidates that Fisher factors are fitted on, once for all queries."""


FIXED_LEARNING_RATES = ((0.01, 1), (0.1, 1), (1.0, 1))
"""Learning rates and steps of the paper's fixed-rate ascent that are tried."""


def traced(tracer: ForwardInf, queries: Dataset, candidates: Dataset) -> dict[str, Attribution]:
    """Trace along the tracer's direction and along the plain gradient, in several units.

    `forward_inf` and `gradient` tell how a query fares beside all of them, in the attributor's units: those of the
    candidates' sensitivity; `..._single` each query by itself; `..._plain` are scores in units of the loss, and
    `..._standardised` in deviations over the queries.
    """
    found: dict[str, Attribution] = {}
    for name, one in {"forward_inf": tracer, "gradient": along_the_gradient(tracer)}.items():
        single = one.trace(queries, candidates)
        plain = one.with_options(units="loss").trace(queries, candidates)
        found |= {name: single.standardised(), f"{name}_single": single}
        found |= {f"{name}_plain": plain, f"{name}_standardised": plain.standardised()}
    return found


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
    captions = BM25(input_column=CAPTION).trace(queries, candidates)
    return {**similar(adapter, queries, candidates), "bm25": captions, **blind}


def similar(adapter: DiffusionAdapter, queries: Dataset, candidates: Dataset) -> dict[str, Attribution]:
    """Compare pictures: by pixels or latents, their distance and their cosine, and as a UNet sees them."""
    ways: dict[str, Attributor] = {
        "pixel_distance": PixelDistance(adapter),
        "representation": RepresentationSimilarity(adapter=adapter),
    }
    if middle_of(adapter.model) is not None:
        ways["denoiser_features"] = DenoiserFeatures(adapter)
    return {name: way.trace(queries, candidates) for name, way in ways.items()}


def baselines(
    tracer: ForwardInf, queries: Dataset, candidates: Dataset, truth: list[list[int]]
) -> dict[str, Attribution]:
    """Trace with what needs candidates' gradients, a choice by the truth, or the truth itself.

    TracIn, influence functions along the tracer's direction, [`unlearning`], and the tracer's step downwards, as they
    are, standardised over the queries, and (`..._by_sensitivity`) in the units of [`traced`]; the paper's fixed
    learning rate, the best of several; and the proponents' own pictures as the queries.
    """
    parts: dict[str, Any] = {"adapter": tracer.adapter, "cache_dir": tracer.cache_dir}
    dot = TracIn(**parts).trace(queries, candidates)
    cosine = TracIn(similarity="cosine", **parts).trace(queries, candidates)
    first_order = FirstOrder(ascent=tracer.ascent, **parts).trace(queries, candidates)
    own = [candidates.select(rows) for rows in truth]
    itself = as_queries([rows[0][CAPTION] for rows in own], [rows[IMAGE][:] for rows in own])
    plain = tracer.with_options(units="loss")
    unlearnt = unlearning(plain).trace(queries, candidates)
    descent = plain.with_options(ascent=replace(tracer.ascent, mode="descent")).trace(queries, candidates)
    exemplars = replace(plain.trace(itself, candidates), queries=queries)
    shaken = tracer.sensitivity(candidates)
    return {
        **_in_units("tracin", dot, shaken),
        "tracin_cosine": cosine,
        "tracin_cosine_standardised": cosine.standardised(),
        **_in_units("influence_functions", first_order, shaken),
        **_in_units("unlearning", unlearnt, shaken),
        **_in_units("descent", descent, shaken),
        "fixed_learning_rate": fixed_learning_rate(tracer, queries, candidates, truth, FIXED_LEARNING_RATES),
        **_in_units("exemplar_as_query", exemplars, shaken),
    }


def unlearning(tracer: ForwardInf) -> ForwardInf:
    """Unlearn a drawing as Wang et al. (2024) do: a step up its loss, corrected by the Fisher matrix.

    The matrix in its eigenvalue-corrected Kronecker factors, and the step as long as the tracer's.
    """
    return tracer.with_options(ascent=replace(tracer.ascent.along("ekfac"), sample=FISHER_SAMPLE))


def _in_units(name: str, found: Attribution, shaken: np.ndarray) -> dict[str, Attribution]:
    relative = replace(found, scores=found.scores / shaken, config={**found.config, "units": "sensitivity"})
    return {
        name: found,
        f"{name}_standardised": found.standardised(),
        f"{name}_by_sensitivity": relative.standardised(),
    }
