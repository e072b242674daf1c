"""Distance in pixels or latents: what an attributor of images has to beat, and can't on exact copies."""

from typing import Any

import numpy as np
from datasets import Dataset

from hf_forward_inf.adapters import Adapter, DiffusionAdapter
from hf_forward_inf.baselines.base import ModelBaseline
from hf_forward_inf.passes.candidate_pass import encode


class PixelDistance(ModelBaseline):
    """Scores a candidate by minus the mean squared distance between its pixels and those of the query's images.

    With a VAE, latents are compared. The denoiser is not run. A query of several images has the mean over them.

    Args:
        model (*optional*): Not used: a denoiser is traced by its adapter.
        processor (*optional*): Not used.
        adapter (`DiffusionAdapter`): Encodes images.
        cache_dir (`str` or `Path`, *optional*): As in [`ForwardInf`].

    Raises:
        TypeError: If the adapter is not a `DiffusionAdapter`.
    """

    name = "pixel_distance"
    adapter: DiffusionAdapter

    @classmethod
    def misfit(cls, adapter: Adapter) -> str | None:
        """Return why an adapter's rows have no images to compare; `None` if they have."""
        if isinstance(adapter, DiffusionAdapter):
            return None
        return f"PixelDistance needs a DiffusionAdapter, which encodes images, not {type(adapter).__name__}."

    @property
    def config(self) -> dict[str, Any]:
        """The size to which images are brought, height and width."""
        return {"size": list(self.adapter.size)}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Return minus mean squared distances, `[queries, candidates]`."""
        batches = [
            self.adapter.collate(
                encode(self.adapter, rows, role, self.cache_dir).select_columns(["tensors", "images"])[:]
            )
            for rows, role in ((queries, "queries"), (candidates, "candidates"))
        ]
        of_queries, of_candidates = (batch["latents"].flatten(2).numpy() for batch in batches)
        weights = batches[0]["weights"].numpy()
        scores = np.empty((len(queries), len(candidates)), dtype=np.float32)
        for i, (images, shares) in enumerate(zip(of_queries, weights, strict=True)):
            distances = np.square(images[:, None] - of_candidates[None, :, 0]).mean(axis=2)
            scores[i] = -(shares[:, None] * distances).sum(axis=0)
        return scores
