"""What a training example does to itself: high for those that nothing else supports, and the measure of its scores."""

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
from hf_forward_inf.ascent.parameters import Parameters, call, copies_in_memory, names_for, radius_of, rank_of_ascent
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.scores.metrics import best_first
from hf_forward_inf.tracing.token_scores import perturbed, rises
from hf_forward_inf.utils.models import evaluating, to_device
from hf_forward_inf.utils.storage import Tensors


def self_influence(tracer: Scorer, rows: Dataset) -> np.ndarray:
    """Score every row as the only candidate of itself; see [`ForwardInf.self_influence`].

    One step along the gradient is taken for several rows in one batch, each row under a model of its own
    (`torch.func.vmap`). Other steps, and models or losses that can't be batched over parameters (what they do depends
    on a value), are run for one row after the other.
    """
    encoded = encode(tracer.adapter, rows, "candidates", tracer.cache_dir)
    with evaluating(tracer.adapter.model), torch.no_grad():
        if _is_one_plain_step(tracer):
            # Attention as plain operations: torch.func has no rule for the fused kernel.
            with suppress(RuntimeError, ValueError), sdpa_kernel(SDPBackend.MATH):
                return _together(tracer, encoded)
        return _one_by_one(tracer, encoded, rows)


def rerank(tracer: Scorer, found: Attribution, k: int) -> Attribution:
    """Order the best candidates of each query anew, by score / self-influence; see [`ForwardInf.rerank`]."""
    if found.config.get("units") == "sensitivity":
        raise ValueError("Shares are of rises as they are: trace with ForwardInf(units='loss') before.")
    best = found.keep(min(k, len(found.candidates)))
    assert best.indices is not None
    rows = np.unique(best.indices)
    if tracer.training is None:  # directions are corrected by the curvature of all candidates, not of these
        tracer = tracer.with_options(training=found.candidates)
    own = self_influence(tracer, found.candidates.select(rows))[np.searchsorted(rows, best.indices)]
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.where(own > 0, best.scores / own, np.nan).astype(np.float32)
    order = np.stack([best_first(row) for row in shares])
    scores, indices = (np.take_along_axis(values, order, axis=1) for values in (shares, best.indices))
    return replace(best, scores=scores, indices=indices, config={**best.config, "reranked": True})


def _is_one_plain_step(tracer: Scorer) -> bool:
    config = tracer.ascent
    plain = config.direction == "gradient" and config.steps == 1 and config.radius is not None
    return plain and rank_of_ascent(tracer.adapter, config) is None


def _one_by_one(tracer: Scorer, encoded: Dataset, rows: Dataset) -> np.ndarray:
    scores = np.full(len(rows), np.nan, dtype=np.float32)
    for i, theta_k, mirrored in perturbed(tracer, encoded, rows):
        alone = encoded[i : i + 1]
        if tracer.measure == "shift":
            scores[i] = _shifts(tracer, theta_k, alone).item()
        else:
            scores[i] = rises(tracer, theta_k, mirrored, alone).sum().item()
    return scores


def _shifts(tracer: Scorer, theta_k: Parameters, features: Rows) -> Tensor:
    adapter, model = tracer.adapter, tracer.adapter.model
    batch = to_device(adapter.collate(features), model)
    before, after = (adapter.outputs(partial(call, model, theta), batch) for theta in ({}, theta_k))
    return (after - before).norm(dim=1)


def _together(tracer: Scorer, encoded: Dataset) -> np.ndarray:
    names = names_for(tracer.adapter, tracer.ascent)
    step = copies_in_memory(tracer.adapter.model, names)
    parts = [_risen(tracer, names, encoded[start : start + step]) for start in range(0, len(encoded), step)]
    return np.concatenate(parts)


def _risen(tracer: Scorer, names: list[str], features: Rows) -> np.ndarray:
    """Move the model against each row, a copy of the parameters for each: how much the row's own loss rises."""
    adapter, model, config = tracer.adapter, tracer.adapter.model, tracer.ascent
    batch = to_device(adapter.collate(features), model)
    batch = adapter.with_shared(batch, set(names))
    shared = {name: value for name, value in batch.items() if not isinstance(value, Tensor)}
    own = dict(model.named_parameters())
    theta = {name: own[name].detach() for name in names}
    radius = radius_of(config, theta.values())

    def loss(theta: Tensors, row: Batch) -> Tensor:
        alone = {name: value[None] for name, value in row.items()}
        return adapter.loss(partial(call, model, theta), {**shared, **alone})[0]

    def direction_of(theta: Tensors, row: Batch) -> tuple[Tensor, Tensor]:
        value = loss(theta, row)
        size = value.detach().abs()  # in units of the loss, as `ascent.ascend` has it
        return value / torch.where(size > 0, size, 1), value

    def outputs(theta: Tensors, row: Batch) -> Tensor:
        alone = {name: value[None] for name, value in row.items()}
        return adapter.outputs(partial(call, model, theta), {**shared, **alone})[0]

    def risen(row: Batch) -> Tensor:
        gradient, (_, base) = grad_and_value(direction_of, has_aux=True)(theta, row)
        norm = torch.stack([g.float().square().sum() for g in gradient.values()]).sum().sqrt()

        def moved(radius: float) -> Tensors:
            return {name: theta[name] + (radius / norm * g).to(g.dtype) for name, g in gradient.items()}

        def at(radius: float) -> Tensor:
            return loss(moved(radius), row)

        if tracer.measure == "shift":
            far = -radius if config.mode == "descent" else radius
            return (outputs(moved(far), row) - outputs(theta, row)).norm()
        up = base if config.mode == "descent" else at(radius)
        down = base if config.mode == "ascent" else at(-radius)
        return (up - down) / 2 if config.mode == "symmetric" else up - down

    return vmap(risen)({name: value for name, value in batch.items() if name not in shared}).float().cpu().numpy()
