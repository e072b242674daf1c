"""Self-influence: how much an example's loss rises when the model is moved against that example."""

from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_forward_inf.adapters.base import Batch, Rows
from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.ascent.parameters import (
    Parameters,
    bytes_of_change,
    call,
    copies_in_memory,
    has_length,
    names_for,
    radius_of,
)
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.scores.metrics import best_first
from hf_forward_inf.tracing.token_scores import perturbed, rises
from hf_forward_inf.utils.fingerprints import FINGERPRINT, fingerprint_of_model
from hf_forward_inf.utils.models import evaluating, to_device
from hf_forward_inf.utils.storage import Tensors

SCREENING = ("strategy", "screen", "keep", "audit")
"""Options that decide which candidates have a score, not which score."""


def self_influence(tracer: Scorer, rows: Dataset) -> np.ndarray:
    """Compute each row's score as a candidate for itself, `[rows]`; see [`ForwardInf.self_influence`].

    A single step along the gradient is taken for several rows in one batch, each row with its own parameters
    (`torch.func.vmap`). Other steps, and models or losses that can't be batched over parameters (because their
    control flow depends on values), are run row by row.
    """
    encoded = encode(tracer.adapter, rows, "candidates", tracer.cache_dir)
    with evaluating(tracer.adapter.model), torch.no_grad():
        plain = encoded.with_format(None)
        if _is_one_plain_step(tracer) and tracer.adapter.can_batch(plain, tracer.adapter.lengths(plain)):
            # torch.func supports only the math kernel of attention.
            with suppress(RuntimeError, ValueError), sdpa_kernel(SDPBackend.MATH):
                return _batched(tracer, encoded)
        return _row_by_row(tracer, encoded, rows)


def rerank(tracer: Scorer, found: Attribution, k: int) -> Attribution:
    """Return the best candidates of each query, sorted by score / self-influence; see [`ForwardInf.rerank`]."""
    if found.config.get("units") == "base_loss":
        raise ValueError(
            "Reranking divides scores by self-influence, and these are divided by base losses already: trace with "
            "ForwardInf(units='loss')."
        )
    own = {**tracer.config, FINGERPRINT: fingerprint_of_model(tracer.adapter.model)}
    differ = [name for name, value in own.items() if found.config.get(name) != value]
    differ = [name for name in differ if name not in SCREENING]
    if differ or found.config.get("standardised"):
        raise ValueError(
            f"These scores are not this attributor's own ({', '.join(differ) or 'they are standardised'}): trace with "
            "it first."
        )
    best = found.keep(min(k, len(found.candidates)))
    assert best.indices is not None
    rows = np.unique(best.indices)
    if tracer.training is None:  # curvature is that of all candidates, not of the best alone
        tracer = tracer.with_options(training=found.candidates)
    alone = self_influence(tracer, found.candidates.select(rows))[np.searchsorted(rows, best.indices)]
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.where(alone > 0, best.scores / alone, np.nan).astype(np.float32)
    if best.stage is not None:  # a floor is no score to divide
        shares[~best.stage] = np.nan
    order = np.stack([best_first(row) for row in shares])
    scores, indices = (np.take_along_axis(values, order, axis=1) for values in (shares, best.indices))
    stage = None if best.stage is None else np.take_along_axis(best.stage, order, axis=1)
    config = {**best.config, "reranked": True}
    return replace(best, scores=scores, indices=indices, config=config, stage=stage, backgrounds=None)


def _is_one_plain_step(tracer: Scorer) -> bool:
    config = tracer.ascent
    plain = config.direction == "gradient" and config.steps == 1 and tracer.falls == 1
    return plain and has_length(tracer.adapter, config)


def _row_by_row(tracer: Scorer, encoded: Dataset, rows: Dataset) -> np.ndarray:
    scores = np.full(len(rows), np.nan, dtype=np.float32)
    for i, theta_k, mirrored in perturbed(tracer, encoded, rows):
        alone = encoded[i : i + 1]
        if tracer.measure == "shift":
            scores[i] = _shifts(tracer, theta_k, alone).item()
        else:
            scores[i] = rises(tracer, theta_k, mirrored, alone).sum().item()
    return scores


def _shifts(tracer: Scorer, theta_k: Parameters, features: Rows) -> Tensor:
    """Compute how far the outputs move, `[rows]`."""
    adapter, model = tracer.adapter, tracer.adapter.model
    batch = to_device(adapter.collate(features), model)
    before, after = (adapter.outputs(partial(call, model, theta), batch) for theta in ({}, theta_k))
    return (after - before).norm(dim=1)


def _batched(tracer: Scorer, encoded: Dataset) -> np.ndarray:
    names = names_for(tracer.adapter, tracer.ascent)
    size = copies_in_memory(tracer.adapter.model, bytes_of_change(tracer.adapter.model, names))
    batches = (encoded[start : start + size] for start in range(0, len(encoded), size))
    return np.concatenate([_scores_of_batch(tracer, names, features) for features in batches])


def _scores_of_batch(tracer: Scorer, names: list[str], features: Rows) -> np.ndarray:
    """Compute the self-influence of each row under its own copy of the parameters, `[rows]`."""
    adapter, model, config = tracer.adapter, tracer.adapter.model, tracer.ascent
    batch = adapter.with_shared(to_device(adapter.collate(features), model), set(names))
    by_row = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    by_batch = {name: value for name, value in batch.items() if name not in by_row}
    parameters = dict(model.named_parameters())
    theta = {name: parameters[name].detach() for name in names}
    radius = radius_of(config, theta.values())

    def batch_of(row: Batch) -> Batch:
        return {**by_batch, **{name: value[None] for name, value in row.items()}}

    def loss(theta: Tensors, row: Batch) -> Tensor:
        return adapter.loss(partial(call, model, theta), batch_of(row))[0]

    def outputs(theta: Tensors, row: Batch) -> Tensor:
        return adapter.outputs(partial(call, model, theta), batch_of(row))[0]

    def relative_loss(theta: Tensors, row: Batch) -> tuple[Tensor, Tensor]:
        value = loss(theta, row)
        size = value.detach().abs()  # a memorised row's own gradient would vanish in float32, as in `ascend`
        return value / torch.where(size > 0, size, 1), value

    def score(row: Batch) -> Tensor:
        gradient, (_, base) = grad_and_value(relative_loss, has_aux=True)(theta, row)
        norm = torch.stack([g.float().square().sum() for g in gradient.values()]).sum().sqrt()

        def moved(radius: float) -> Tensors:
            return {name: theta[name] + (radius / norm * g).to(g.dtype) for name, g in gradient.items()}

        if tracer.measure == "shift":
            signed = -radius if config.mode == "descent" else radius
            return (outputs(moved(signed), row) - outputs(theta, row)).norm()
        up = base if config.mode == "descent" else loss(moved(radius), row)
        down = base if config.mode == "ascent" else loss(moved(-radius), row)
        return (up - down) / 2 if config.mode == "symmetric" else up - down

    return vmap(score)(by_row).float().cpu().numpy()
