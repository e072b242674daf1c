"""Scores token by token: where in a training example the loss rises."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_forward_inf.adapters.base import Adapter, Rows
from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.ascent.parameters import Parameters, call
from hf_forward_inf.ascent.steps import Mirrored
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.passes.loss_pass import weighed
from hf_forward_inf.utils.models import evaluating, to_device
from hf_forward_inf.utils.progress import progress


def explain(tracer: Scorer, found: Attribution, k: int = 10) -> Attribution:
    """Compute how much each token's loss rises, for the best candidates of each query.

    Args:
        tracer (`ForwardInf`): Perturbs the model for the queries.
        found (`Attribution`): An attribution, its own or another attributor's.
        k (`int`, defaults to 10): Candidates of each query to explain; those without a score of their own, which a
            screen has left out, are not.

    Returns:
        `Attribution`: The same with `details`, a row for each of these candidates: `query`, `candidate`, `terms` (the
        tokens' texts) and `term_scores` (float32, nats). They sum to the score if `reduction="sum"`, `units="loss"`
        and scores are not standardised.

    Raises:
        NotImplementedError: If the adapter does not say what the terms of its loss stand for.
    """
    adapter, candidates = tracer.adapter, found.candidates
    queries = encode(adapter, found.queries, "queries", tracer.cache_dir)
    columns = list(adapter.columns_in(candidates.column_names))
    details: dict[str, list[Any]] = {"query": [], "candidate": [], "terms": [], "term_scores": []}
    counted = progress("scoring tokens", len(queries), "queries")
    with counted as advance, evaluating(adapter.model), torch.no_grad():
        for i, theta_k, mirrored in perturbed(tracer, queries, candidates):
            advance(1)
            top = found.top(i, k)
            rows = np.array(top["candidate"][:], dtype=int)
            places = found.ranking(i)[: len(rows)]
            if found.stage is not None:  # all others have the floor, which no tokens explain
                computed = np.array(top["stage"][:], dtype=bool)
                rows, places = rows[computed], places[computed]
            if not len(rows):
                continue
            features = adapter.encode(adapter.prepare(candidates.select_columns(columns))[places.tolist()])
            term_scores: list[np.ndarray] = []
            for part in _together(adapter, features):
                term_scores += [*rises(tracer, theta_k, mirrored, part).cpu().numpy()]
            for row, texts, scores in zip(rows, adapter.term_texts(features), term_scores, strict=True):
                details["query"].append(i)
                details["candidate"].append(int(row))
                details["terms"].append(texts)
                details["term_scores"].append(scores[: len(texts)].astype(np.float32))
    return replace(found, details=Dataset.from_dict(details))


def _together(adapter: Adapter, features: Rows) -> list[Rows]:
    """Return rows as one batch, or one by one where a row's loss depends on the others."""
    count = len(features["terms"])
    if adapter.can_batch(Dataset.from_dict(features), adapter.lengths(features)):
        return [features]
    return [{name: values[i : i + 1] for name, values in features.items()} for i in range(count)]


def perturbed(
    tracer: Scorer, queries: Dataset, candidates: Dataset
) -> Iterator[tuple[int, Parameters, Parameters | None]]:
    """Perturb the model for one query after another, a block at a time.

    Args:
        tracer (`ForwardInf`): Perturbs the model.
        queries (`datasets.Dataset`): Encoded queries.
        candidates (`datasets.Dataset`): Used as the training data if the tracer has no `training`.

    Yields:
        `tuple`: The query's row number, theta_K, and its mirror image if scores are symmetric, else `None`. Queries
        that cannot move the model are skipped.
    """
    for rows, perturbation in tracer.perturber(candidates).blocks(queries):
        mirrored = Mirrored(perturbation).thetas if tracer.ascent.mode == "symmetric" else None
        for i, theta_k in enumerate(perturbation.thetas):
            if theta_k is not None:
                yield rows.start + i, theta_k, mirrored[i] if mirrored else None


def rises(tracer: Scorer, theta_k: Parameters, mirrored: Parameters | None, features: dict[str, list[Any]]) -> Tensor:
    """Compute how much each term's loss rises, `[rows, terms]`, with the sign of a score."""
    adapter, model = tracer.adapter, tracer.adapter.model
    batch = to_device(adapter.collate(features), model)

    def losses(theta: Parameters) -> Tensor:
        return adapter.term_losses(partial(call, model, theta), batch)

    if mirrored is not None:
        return (losses(theta_k) - losses(mirrored)) / 2
    rise = losses(theta_k) - losses({})
    return -rise if tracer.ascent.mode == "descent" else weighed(rise, tracer.falls)
