"""What a denoiser makes of pictures on the way: an embedding of them, where there is no other model to ask."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.adapters.base import Batch
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.passes.candidate_pass import CandidatePass
from hf_forward_inf.utils.models import evaluating, to_device


class DenoiserFeatures:
    """Scores a candidate by the cosine of its features with the query's: those in the middle of a UNet.

    Features are averaged over places, times and a row's pictures, and taken relative to the candidates' mean: what all
    pictures have in common says nothing.

    Args:
        adapter (`DiffusionAdapter`): Noise, times and the UNet.
        cache_dir (`Path`, *optional*): As in [`ForwardInf`].

    Raises:
        TypeError: If the denoiser has no `mid_block`.
    """

    name = "denoiser_features"

    def __init__(self, adapter: DiffusionAdapter, cache_dir: Path | None = None):
        middle = middle_of(adapter.model)
        if middle is None:
            raise TypeError(f"{type(adapter.model).__name__} is no UNet: it has no mid_block.")
        self.adapter, self.cache_dir, self.middle = adapter, cache_dir, middle

    def trace(self, queries: Dataset, candidates: Dataset, top_k: int | None = None) -> Attribution:
        """Score every candidate for every query: cosines, float32 `[queries, candidates]`."""
        with evaluating(self.adapter.model):
            mine, theirs = self._features(queries), self._features(candidates)
        mean = np.nanmean(theirs, axis=1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            mine, theirs = ((f - mean) / np.linalg.norm(f - mean, axis=0) for f in (mine, theirs))
        return Attribution(mine.T @ theirs, queries, candidates, method=self.name).keep(top_k)

    def _features(self, rows: Dataset) -> np.ndarray:
        run = CandidatePass(self.adapter, rows, cache_dir=self.cache_dir)
        first = to_device(self.adapter.collate(run.encoded[:1]), self.adapter.model)
        return run.run(self._middle, self._middle(first).shape[1], self.name, "features")

    @torch.no_grad()
    def _middle(self, batch: Batch) -> np.ndarray:
        """Run the denoiser and look into its middle: `[rows, channels]`."""
        seen: list[Tensor] = []

        def look(module: nn.Module, args: Any, output: Tensor) -> None:
            seen.append(output)

        hook = self.middle.register_forward_hook(look)
        try:
            self.adapter.term_losses(self.adapter.model, batch)
        finally:
            hook.remove()
        weights = batch["weights"]
        features = seen[0].float().mean(dim=(2, 3)).view(*weights.shape, self.adapter.timesteps, -1).mean(dim=2)
        # Pictures that only fill up a batch weigh nothing.
        return torch.einsum("ric,ri->rc", features, weights).cpu().numpy()


def middle_of(model: nn.Module) -> nn.Module | None:
    """Find a UNet's middle; `None` where the model is none."""
    return next((part for name, part in model.named_modules() if name.rpartition(".")[2] == "mid_block"), None)
