"""Features of a denoiser: an embedding of images where no other model is at hand."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_forward_inf.adapters import Adapter, DiffusionAdapter
from hf_forward_inf.adapters.base import Batch
from hf_forward_inf.baselines.base import ModelBaseline
from hf_forward_inf.passes.candidate_pass import CandidatePass
from hf_forward_inf.utils.models import evaluating, to_device


class DenoiserFeatures(ModelBaseline):
    """Scores a candidate by the cosine between its features and the query's, taken from the middle of a UNet.

    Features are averaged over positions, timesteps and a row's images. The candidates' mean is subtracted, since what
    all images share carries no information.

    Args:
        model (*optional*): Not used: a denoiser is traced by its adapter.
        processor (*optional*): Not used.
        adapter (`DiffusionAdapter`): Noise, timesteps and the UNet.
        cache_dir (`str` or `Path`, *optional*): As in [`ForwardInf`].

    Raises:
        TypeError: If the adapter is not a `DiffusionAdapter`, or the denoiser has no `mid_block`.
    """

    name = "denoiser_features"
    adapter: DiffusionAdapter

    @classmethod
    def misfit(cls, adapter: Adapter) -> str | None:
        """Return why an adapter's model has no such features; `None` if it has."""
        if not isinstance(adapter, DiffusionAdapter):
            return f"DenoiserFeatures needs a DiffusionAdapter, not {type(adapter).__name__}."
        if middle_of(adapter.model) is None:
            return f"DenoiserFeatures needs a UNet: {type(adapter.model).__name__} has no mid_block."
        return None

    @property
    def config(self) -> dict[str, Any]:
        """Timesteps, and the seed of times and noise."""
        return {"timesteps": self.adapter.timesteps, "seed": self.adapter.seed}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Return cosines, float32 `[queries, candidates]`."""
        with evaluating(self.adapter.model):
            of_queries, of_candidates = self._features(queries), self._features(candidates)
        mean = np.nanmean(of_candidates, axis=1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            of_queries, of_candidates = (
                (features - mean) / np.linalg.norm(features - mean, axis=0) for features in (of_queries, of_candidates)
            )
        return of_queries.T @ of_candidates

    def _features(self, rows: Dataset) -> np.ndarray:
        """Return each row's features, `[channels, rows]`."""
        run = CandidatePass(self.adapter, rows, cache_dir=self.cache_dir)
        first = to_device(self.adapter.collate(run.encoded[:1]), self.adapter.model)
        return run.run(self._middle, self._middle(first).shape[1], self.name, "features")

    @torch.no_grad()
    def _middle(self, batch: Batch) -> np.ndarray:
        """Run the denoiser and return the output of its middle block, averaged: `[rows, channels]`."""
        seen: list[Tensor] = []

        def look(module: nn.Module, args: Any, output: Tensor) -> None:
            seen.append(output)

        middle = middle_of(self.adapter.model)
        assert middle is not None  # or the constructor would have raised
        hook = middle.register_forward_hook(look)
        try:
            self.adapter.term_losses(self.adapter.model, batch)
        finally:
            hook.remove()
        weights = batch["weights"]
        features = seen[0].float()[..., None].flatten(2).mean(2)  # over positions, if there are any
        features = features.view(*weights.shape, self.adapter.timesteps, -1).mean(2)
        # Images that only pad a row to the batch's size have weight 0.
        return torch.einsum("ric,ri->rc", features, weights).cpu().numpy()


def middle_of(model: nn.Module) -> nn.Module | None:
    """Return a UNet's middle block; `None` for other models."""
    return next((part for name, part in model.named_modules() if name.rpartition(".")[2] == "mid_block"), None)
