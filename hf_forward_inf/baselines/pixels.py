"""Distance in pixels (or latents): what an attributor of pictures has to beat, and where it can't be beaten."""

from pathlib import Path

import numpy as np
from datasets import Dataset

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.passes.candidate_pass import encode


class PixelDistance:
    """Scores a candidate by minus its mean squared distance to a query's pictures, each by itself.

    Args:
        adapter (`DiffusionAdapter`): Encodes; its denoiser is not run.
        cache_dir (`Path`, *optional*): As in [`ForwardInf`].
    """

    name = "pixel_distance"

    def __init__(self, adapter: DiffusionAdapter, cache_dir: Path | None = None):
        self.adapter, self.cache_dir = adapter, cache_dir

    def trace(self, queries: Dataset, candidates: Dataset, top_k: int | None = None) -> Attribution:
        """Score every candidate for every query."""
        batches = [
            self.adapter.collate(
                encode(self.adapter, rows, role, self.cache_dir).select_columns(["tensors", "images"])[:]
            )
            for rows, role in ((queries, "queries"), (candidates, "candidates"))
        ]
        asked, told = (batch["latents"].flatten(2).numpy() for batch in batches)
        weights = batches[0]["weights"].numpy()
        scores = np.empty((len(queries), len(candidates)), dtype=np.float32)
        for i, (images, shares) in enumerate(zip(asked, weights, strict=True)):
            distances = np.square(images[:, None] - told[None, :, 0]).mean(axis=2)
            scores[i] = -(shares[:, None] * distances).sum(axis=0)
        return Attribution(scores, queries, candidates, method=self.name).keep(top_k)
