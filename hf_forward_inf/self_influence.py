"""How much a training example supports itself: high for those that nothing else supports, such as wrong labels."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset

from hf_forward_inf.candidate_pass import encode
from hf_forward_inf.modes import evaluating
from hf_forward_inf.terms import perturbed, rises

if TYPE_CHECKING:
    from hf_forward_inf.forward_inf import ForwardInf


def self_influence(tracer: "ForwardInf", rows: Dataset) -> np.ndarray:
    """Score every row as the only candidate of itself; see [`ForwardInf.self_influence`]."""
    adapter = tracer.adapter
    encoded = encode(adapter, rows, "candidates", tracer.cache_dir)
    scores = np.full(len(rows), np.nan, dtype=np.float32)
    with evaluating(adapter.model), torch.no_grad():
        for i, theta_k, mirrored in perturbed(tracer, encoded, rows):
            scores[i] = rises(tracer, theta_k, mirrored, encoded[i : i + 1]).sum().item()
    return scores
