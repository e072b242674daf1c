"""What is compared on drawings: directions of Forward-INF, baselines, and controls that ignore the query."""

from dataclasses import replace

import numpy as np
from datasets import Dataset

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.baselines import attributors_for
from hf_forward_inf.evaluation.comparison import fixed_learning_rate
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.toys.drawings import CAPTION, IMAGE, as_queries
from hf_forward_inf.utils.models import evaluating

FISHER_SAMPLE = 256
"""Number of candidates that Fisher factors are fitted on, once for all queries."""
FIXED_LEARNING_RATES = ((0.01, 1), (0.1, 1), (1.0, 1))
"""Learning rates and numbers of steps of the paper's fixed-rate ascent that are tried."""
SIMILARITIES = ("pixel_distance", "representation", "denoiser_features")
"""Attributors that compare images: by pixels or latents, their distance and their cosine, and by a UNet's features."""


def traced(tracer: ForwardInf, queries: Dataset, candidates: Dataset) -> dict[str, Attribution]:
    """Return attributions along the tracer's direction and along the plain gradient, in several units.

    `forward_inf` and `gradient`: in units of the candidates' losses, relative to the mean over the queries.
    `..._single`: the same, each query by itself. `..._plain`: in units of the loss. `..._standardised`: in standard
    deviations over the queries.
    """
    found: dict[str, Attribution] = {}
    for name, one in {"forward_inf": tracer, "gradient": along_the_gradient(tracer)}.items():
        single = one.trace(queries, candidates)
        plain = one.with_options(units="loss").trace(queries, candidates)
        found |= {name: single.standardised(), f"{name}_single": single}
        found |= {f"{name}_plain": plain, f"{name}_standardised": plain.standardised()}
    return found


def along_the_gradient(tracer: ForwardInf) -> ForwardInf:
    """Return a tracer whose step has the same length, along the plain gradient."""
    return tracer.with_options(ascent=tracer.ascent.along("gradient"))


def controls(
    before: DiffusionAdapter, adapter: DiffusionAdapter, queries: Dataset, candidates: Dataset
) -> dict[str, Attribution]:
    """Return attributions that compare images and captions, and two that ignore the query.

    `low_loss` is -L(theta), `learned` the fall of a candidate's loss during fine-tuning.
    """
    with evaluating(before.model, adapter.model):
        first, now = (LossPass(one, candidates).base() for one in (before, adapter))
    blind = {
        name: Attribution(np.tile(scores, (len(queries), 1)), queries, candidates, method=name)
        for name, scores in {"low_loss": -now, "learned": first - now}.items()
    }
    similar = attributors_for(ForwardInf(adapter=adapter), (*SIMILARITIES, "bm25"))
    return {**{name: one.trace(queries, candidates) for name, one in similar.items()}, **blind}


def baselines(
    tracer: ForwardInf, queries: Dataset, candidates: Dataset, truth: list[list[int]]
) -> dict[str, Attribution]:
    """Return attributions that need the candidates' gradients, a choice by the truth, or the truth itself.

    TracIn, the first-order limit of the tracer's step, [`unlearning`] and the tracer's step downwards: in units of the
    loss, standardised over the queries, and (`..._by_base_loss`) in the units of [`traced`]; the paper's fixed
    learning rate, the best of several; and the proponents' own images as queries.
    """
    gradients = {
        name: one.trace(queries, candidates)
        for name, one in attributors_for(tracer, ("tracin", "tracin_cosine", "first_order")).items()
    }
    cosine = gradients["tracin_cosine"]
    own = [candidates.select(rows) for rows in truth]
    itself = as_queries([rows[0][CAPTION] for rows in own], [rows[IMAGE][:] for rows in own])
    plain = tracer.with_options(units="loss")
    unlearnt = unlearning(plain).trace(queries, candidates)
    descent = plain.with_options(ascent=replace(tracer.ascent, mode="descent")).trace(queries, candidates)
    exemplars = replace(plain.trace(itself, candidates), queries=queries)
    with evaluating(tracer.adapter.model):
        base = tracer.candidate_pass(candidates).base()
    return {
        **_in_units("tracin", gradients["tracin"], base),
        "tracin_cosine": cosine,
        "tracin_cosine_standardised": cosine.standardised(),
        **_in_units("first_order", gradients["first_order"], base),
        **_in_units("unlearning", unlearnt, base),
        **_in_units("descent", descent, base),
        "fixed_learning_rate": fixed_learning_rate(tracer, queries, candidates, truth, FIXED_LEARNING_RATES),
        **_in_units("exemplar_as_query", exemplars, base),
    }


def unlearning(tracer: ForwardInf) -> ForwardInf:
    """Return a tracer that unlearns a drawing as Wang et al. (2024) do: a step up its loss along the Fisher inverse.

    The Fisher matrix is in eigenvalue-corrected Kronecker factors; the step has the tracer's length.
    """
    return tracer.with_options(ascent=replace(tracer.ascent.along("ekfac"), sample=FISHER_SAMPLE))


def _in_units(name: str, found: Attribution, base: np.ndarray) -> dict[str, Attribution]:
    relative = replace(found, scores=found.scores / base, config={**found.config, "units": "base_loss"})
    return {
        name: found,
        f"{name}_standardised": found.standardised(),
        f"{name}_by_base_loss": relative.standardised(),
    }
