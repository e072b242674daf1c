"""Where in a training example the loss rises: at which tokens."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.ascent.parameters import Parameters, call
from hf_forward_inf.ascent.steps import Mirrored
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.utils.models import evaluating, to_device


def explain(tracer: Scorer, found: Attribution, k: int = 10) -> Attribution:
    """Tell, for the best candidates of each query, how much each token's loss rises.

    Args:
        tracer (`ForwardInf`): What traced.
        found (`Attribution`): Its attribution.
        k (`int`, defaults to 10): Candidates of each query.

    Returns:
        `Attribution`: The same with `details`, a row for each of these candidates: `query`, `candidate`, `terms` (the
        tokens' texts) and `term_scores` (float32, nats), which sum to the score (with `reduction="sum"` and
        `units="loss"`, hubs and standardising aside).

    Raises:
        NotImplementedError: If the adapter can't say what the terms of its loss stand for.
    """
    adapter, candidates = tracer.adapter, found.candidates
    queries = encode(adapter, found.queries, "queries", tracer.cache_dir)
    columns = list(adapter.columns_in(candidates.column_names))
    details: dict[str, list[Any]] = {"query": [], "candidate": [], "terms": [], "term_scores": []}
    with evaluating(adapter.model), torch.no_grad():
        for i, theta_k, mirrored in perturbed(tracer, queries, candidates):
            rows = found.top(i, k)["candidate"]
            if not len(rows):
                continue
            features = adapter.encode(adapter.prepare(candidates.select_columns(columns))[list(rows)])
            risen = rises(tracer, theta_k, mirrored, features).cpu().numpy()
            for row, texts, scores in zip(rows, adapter.term_texts(features), risen, strict=True):
                details["query"].append(i)
                details["candidate"].append(row)
                details["terms"].append(texts)
                details["term_scores"].append(scores[: len(texts)].astype(np.float32))
    return replace(found, details=Dataset.from_dict(details))


def perturbed(
    tracer: Scorer, queries: Dataset, candidates: Dataset
) -> Iterator[tuple[int, Parameters, Parameters | None]]:
    """Perturb the model for one query after the other, a block at a time.

    Args:
        tracer (`ForwardInf`): How.
        queries (`datasets.Dataset`): Encoded.
        candidates (`datasets.Dataset`): Stand for the training data, unless the tracer has it.

    Yields:
        `tuple`: The query's row, theta_K, and its mirror image where scores are symmetric. Queries that cannot move
        the model are left out.
    """
    for rows, perturbation in tracer.perturber(candidates).blocks(queries):
        mirrored = Mirrored(perturbation).thetas if tracer.ascent.mode == "symmetric" else None
        for i, theta_k in enumerate(perturbation.thetas):
            if theta_k is not None:
                yield rows.start + i, theta_k, mirrored[i] if mirrored else None


def rises(tracer: Scorer, theta_k: Parameters, mirrored: Parameters | None, features: dict[str, list[Any]]) -> Tensor:
    """By how much each term's loss rises, `[rows, terms]`, with the sign that scores have."""
    adapter, model = tracer.adapter, tracer.adapter.model
    batch = to_device(adapter.collate(features), model)

    def losses(theta: Parameters) -> Tensor:
        return adapter.term_losses(partial(call, model, theta), batch)

    if mirrored is not None:
        return (losses(theta_k) - losses(mirrored)) / 2
    rise = losses(theta_k) - losses({})
    return -rise if tracer.ascent.mode == "descent" else rise
