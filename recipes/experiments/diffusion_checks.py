"""Checks of scores of drawings: noise, agreement with TracIn, captions, and cost in passes and memory."""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from datasets import Dataset

from experiments.diffusion_methods import along_the_gradient
from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.adapters.diffusion_inputs import ENCODERS
from hf_forward_inf.baselines import TracIn
from hf_forward_inf.evaluation import cost
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.scores.metrics import recalls_at_k
from hf_forward_inf.toys.drawings import CAPTION, IMAGE, as_queries
from hf_forward_inf.utils.fingerprints import uncached
from hf_forward_inf.utils.models import evaluating
from hf_forward_inf.utils.processes import progress_bars

QUERIES, CANDIDATES, SEEDS = 4, 64, 8
"""Largest numbers of queries, candidates and noise seeds of the checks."""


def checks(
    tracer: ForwardInf, queries: Dataset, candidates: Dataset, truth: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Return all figures of the checks by their names in `metrics.json`.

    Of all queries `swapped/...`: [`swapped`], `uncaptioned/...`: [`uncaptioned`]. Of a few: `tracin_pearson`:
    [`agreement`]; `variance_ratio` and `noise_share`: [`noise`]; `second_query/...`: [`second_query`];
    `forward_passes_per_query` and `peak_memory_ratio`: [`cost.measure`].
    """
    few = queries.select(range(min(QUERIES, len(queries))))
    some = candidates.select(range(min(CANDIDATES, len(candidates))))
    return {
        **swapped(tracer, queries, candidates, truth),
        **uncaptioned(tracer, queries, candidates, truth),
        "tracin_pearson": agreement(tracer, few, some),
        **noise(tracer, few, some),
        **second_query(tracer, few, candidates),
        **cost.measure(tracer, few, candidates),
    }


def swapped(
    tracer: ForwardInf, queries: Dataset, candidates: Dataset, truth: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Swap pictures between captions: do scores follow the caption or the pictures?

    Returns:
        `dict[str, float]`: `swapped/caption_first` and `swapped/picture_first`, the share of these queries for which
        the proponent of the caption, or that of the pictures, comes first.
    """
    pictures = queries[IMAGE][:]
    mixed = as_queries(queries[CAPTION][:], [*pictures[1:], pictures[0]])
    scores = tracer.trace(mixed, candidates).scores
    owners = {"caption": truth, "picture": [*truth[1:], truth[0]]}
    return {f"swapped/{name}_first": float(recalls_at_k(scores, own, 1).mean()) for name, own in owners.items()}


def uncaptioned(
    tracer: ForwardInf, queries: Dataset, candidates: Dataset, truth: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Leave out the captions of queries and candidates: do the pictures alone suffice?

    Returns:
        `dict[str, float]`: `uncaptioned/top1`, the share of queries whose proponent comes first, in the tracer's
        units and standardised over the queries; `uncaptioned/standardised/top1`, the same in units of the loss.
    """
    blank = [rows.remove_columns(CAPTION).add_column(CAPTION, [""] * len(rows)) for rows in (queries, candidates)]
    found = {"": tracer, "standardised/": tracer.with_options(units="loss")}
    return {
        f"uncaptioned/{name}top1": float(recalls_at_k(one.trace(*blank).standardised().scores, truth, 1).mean())
        for name, one in found.items()
    }


def agreement(tracer: ForwardInf, queries: Dataset, candidates: Dataset) -> float:
    """Return the correlation of scores along the gradient with TracIn's dot products: Pearson's, a mean over queries.

    The step has the tracer's radius; the two agree as far as the model is linear at this distance.
    """
    found = along_the_gradient(tracer).with_options(units="loss").trace(queries, candidates).scores
    exact = TracIn(adapter=tracer.adapter, cache_dir=tracer.cache_dir).trace(queries, candidates).scores
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(found, exact, strict=True)]))


def noise(tracer: ForwardInf, queries: Dataset, candidates: Dataset) -> dict[str, float]:
    """Measure how much scores vary with the seed of timesteps and noise.

    Returns:
        `dict[str, float]`: `variance_ratio`, variance of a score if theta and theta_K get different noise / if they
        get the same, means over queries and candidates; `noise_share`, the latter variance / that of scores over
        candidates.
    """
    adapter = tracer.adapter
    assert isinstance(adapter, DiffusionAdapter)
    moved = tracer.perturber(candidates).perturbation(encode(adapter, queries, "queries", tracer.cache_dir)[:])
    base, perturbed = [], []
    with evaluating(adapter.model), progress_bars(False):
        for seed in range(SEEDS):
            other = copy.copy(adapter)
            other.seed = seed
            loss = LossPass(other, candidates, cache_dir=tracer.cache_dir)
            base.append(loss.base())
            perturbed.append(loss(moved, "noise"))
    first, last = np.stack(base)[:, None].astype(np.float64), np.stack(perturbed).astype(np.float64)
    scores = last - first
    common = scores.var(axis=0, ddof=1).mean()
    own = (last.var(axis=0, ddof=1) + first.var(axis=0, ddof=1)).mean()
    return {
        "variance_ratio": float(own / common),
        "noise_share": float(common / scores.mean(axis=0).var(axis=1, ddof=1).mean()),
    }


def second_query(tracer: ForwardInf, queries: Dataset, candidates: Dataset) -> dict[str, float]:
    """Count the work for another query after the candidates were scored for a first one.

    Returns:
        `dict[str, float]`: `second_query/encoder_calls`, calls of layers of the VAE and text encoders;
        `second_query/denoiser_passes`, forward passes of the denoiser / (candidates x timesteps), ascent included.
    """
    adapter = tracer.adapter
    assert isinstance(adapter, DiffusionAdapter)
    with uncached(), evaluating(adapter.model), progress_bars(False):
        loss = LossPass(adapter, candidates, max_batch_length=tracer.max_batch_length)
        rows = encode(adapter, queries.select([1]), "queries")[:]
        perturber = tracer.perturber(candidates)
        with counted(adapter) as calls:
            loss(perturber.perturbation(rows), "second query")
    return {
        "second_query/encoder_calls": calls["encoders"],
        "second_query/denoiser_passes": calls["denoiser"] / (len(candidates) * adapter.timesteps),
    }


@contextmanager
def counted(adapter: DiffusionAdapter) -> Iterator[Counter[str]]:
    """Count the calls of the encoders' layers and the denoiser's input images within a `with` block."""
    calls: Counter[str] = Counter()

    def encoder(*_: Any) -> None:
        calls["encoders"] += 1

    def denoiser(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls["denoiser"] += len(args[0] if args else kwargs[adapter.argument])

    encoders = [getattr(adapter.pipe, name, None) for name in ENCODERS]
    layers = [layer for one in encoders if one is not None for layer in one.modules() if not list(layer.children())]
    hooks = [layer.register_forward_pre_hook(encoder) for layer in layers]
    hooks.append(adapter.model.register_forward_pre_hook(denoiser, with_kwargs=True))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
