"""Features of examples under ascent on a query: the paper's Figure 8."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from datasets import Dataset

from hf_forward_inf.adapters.tensors import TensorAdapter
from hf_forward_inf.ascent.parameters import Parameters, call, perturbed_names
from hf_forward_inf.ascent.steps import ascend
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.utils.models import evaluating, to_device

TOGETHER = 256
"""Rows in a batch."""


def features_under_ascent(tracer: ForwardInf, query: Dataset, rows: Dataset, radii: Sequence[float]) -> np.ndarray:
    """Return the input of the last linear layer for each row, for the models at several radii.

    Args:
        tracer (`ForwardInf`): A tracer with a [`TensorAdapter`]; its ascent sets everything but the radius.
        query (`datasets.Dataset`): One row.
        rows (`datasets.Dataset`): The examples.
        radii (`Sequence[float]`): Lengths of the step; 0 is the trained model.

    Returns:
        `np.ndarray`: float32 `[radii, rows, features]`.

    Raises:
        ValueError: If the query's gradient is zero or not finite.
    """
    adapter = tracer.adapter
    assert isinstance(adapter, TensorAdapter)
    names = perturbed_names(adapter, tracer.ascent.modules)
    asked = encode(adapter, query, "queries", tracer.cache_dir)[:]
    encoded = encode(adapter, rows, "candidates", tracer.cache_dir)
    found = []
    with evaluating(adapter.model):
        for radius in radii:
            theta: Parameters | None = {}
            if radius > 0:
                theta = ascend(adapter, asked, names, replace(tracer.ascent, radius=radius))
            if theta is None:
                raise ValueError("The gradient of the query is zero or not finite: choose another query.")
            parts = []
            for start in range(0, len(rows), TOGETHER):
                batch = to_device(adapter.collate(encoded[start : start + TOGETHER]), adapter.model)
                parts.append(adapter.representation(batch, partial(call, adapter.model, theta)))
            found.append(torch.cat(parts).cpu().numpy())
    return np.stack(found)


def moved(features: np.ndarray) -> np.ndarray:
    """Return how far each example's features move, relative to their initial norm: `[radii, rows]`."""
    lengths = np.linalg.norm(features[0], axis=1)
    return np.linalg.norm(features - features[0], axis=2) / np.maximum(lengths, 1e-12)


def on_a_plane(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return a joint t-SNE layout of the features of all radii, `[radii, rows, 2]`.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("t-SNE needs scikit-learn: pip install 'hf-forward-inf[truth]'.") from error
    flat = features.reshape(-1, features.shape[-1])
    layout = TSNE(perplexity=min(30.0, (len(flat) - 1) / 3), init="pca", random_state=seed)
    return layout.fit_transform(flat).reshape(*features.shape[:2], 2)
