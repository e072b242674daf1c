"""How much a training example supports itself: high for those that nothing else supports, such as wrong labels."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset

from hf_forward_inf.ascent import Mirrored, Perturbation, names_for
from hf_forward_inf.candidate_pass import encode
from hf_forward_inf.directions import direction_for
from hf_forward_inf.modes import evaluating
from hf_forward_inf.modules import held_at_once
from hf_forward_inf.terms import rises

if TYPE_CHECKING:
    from hf_forward_inf.forward_inf import ForwardInf


def self_influence(tracer: "ForwardInf", rows: Dataset) -> np.ndarray:
    """Score every row as the only candidate of itself; see [`ForwardInf.self_influence`]."""
    adapter = tracer.adapter
    names = names_for(adapter, tracer.ascent)
    encoded = encode(adapter, rows, "candidates", tracer.cache_dir)
    scores = np.full(len(rows), np.nan, dtype=np.float32)
    with evaluating(adapter.model), torch.no_grad():
        training = rows if tracer.training is None else tracer.training
        direction = direction_for(tracer.ascent, adapter, training, names, tracer.cache_dir)
        block = held_at_once(adapter.model, names)
        for start in range(0, len(rows), block):
            features = encoded[start : start + block]
            perturbation = Perturbation(adapter, features, names, tracer.ascent, direction)
            mirrored = Mirrored(perturbation).thetas if tracer.ascent.mode == "symmetric" else None
            for i, theta_k in enumerate(perturbation.thetas):
                if theta_k is not None:
                    own = {key: values[i : i + 1] for key, values in features.items()}
                    other = mirrored[i] if mirrored else None
                    scores[start + i] = rises(tracer, theta_k, other, own).sum().item()
    return scores
