"""TrackStar (Chang et al., 2024), simplified: gradients corrected by second moments, at unit norm."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_forward_inf.ascent.parameters import perturbed_names
from hf_forward_inf.baselines.gradients import GradientBaseline, Transform, cosines
from hf_forward_inf.curvature.sample import Sample
from hf_forward_inf.curvature.second_moments import estimated_second_moments, optimizer_file, read_second_moments
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import evaluating


class TrackStar(GradientBaseline):
    """Scores a candidate by the cosine of its gradient with the query's, both divided by root mean squares.

    Args:
        model (`torch.nn.Module`, *optional*): The trained model.
        processor (*optional*): Its tokenizer or image processor.
        second_moments (`str` or `Path`, *optional*): A Trainer's `optimizer.pt` (or its folder), from Adam or AdamW.
            Defaults to an estimate: the mean square of the gradients of some candidates.
        sample (`int`, defaults to 1024): Number of candidates in that estimate.
        damping (`float`, defaults to 1e-3): Share of the mean second moment that is added to all of them; without it,
            parameters that the sample never touches would weigh most.
        projection (`int`, *optional*): Side to which gradients are projected by random normal matrices: those of a
            weight `[out, in]` to `[projection, projection]`, those of a vector to `[projection]`. Takes less memory,
            and makes scores noisier. By default gradients are not projected.
        seed (`int`, defaults to 0): Seed of the sample and the projections.
        **options: `adapter`, `modules`, `cache_dir`, `max_batch_length` of
            [`baselines.gradients.GradientBaseline`].

    Raises:
        FileNotFoundError: If there is no optimizer state at `second_moments`.
        ValueError: If the optimizer state does not match the model, or `projection` is below 1.
    """

    name = "trackstar"

    def __init__(
        self,
        model: nn.Module | None = None,
        processor: Any = None,
        *,
        second_moments: str | Path | None = None,
        sample: int = 1024,
        damping: float = 1e-3,
        projection: int | None = None,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__(model, processor, **options)
        if projection is not None and projection < 1:
            raise ValueError(f"projection={projection} must be at least 1.")
        self.sample, self.damping, self.projection, self.seed = sample, damping, projection, seed
        self.second_moments = None if second_moments is None else optimizer_file(second_moments)

    @property
    def config(self) -> dict[str, Any]:
        """The source of second moments, damping, projection, seed and modules."""
        source = f"{self.sample} candidates" if self.second_moments is None else str(self.second_moments)
        own = {"damping": self.damping, "projection": self.projection, "seed": self.seed}
        return {"second_moments": source, **own, "modules": self.modules}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Return cosines of corrected gradients, `[queries, candidates]`."""
        if self.second_moments is None:
            sample = Sample(self.adapter, candidates, self.sample, self.seed, self.cache_dir)
            with evaluating(self.adapter.model):
                moments = estimated_second_moments(sample, perturbed_names(self.adapter, self.modules or ["all"]))
        else:
            moments = read_second_moments(self.second_moments, self.adapter.model)
        mean = sum(m.sum().item() for m in moments.values()) / sum(m.numel() for m in moments.values())
        transform = self._corrected_by({n: (m + self.damping * mean).rsqrt() for n, m in moments.items()})
        sums = {name: m.sum().item() for name, m in moments.items()}
        key = fingerprint("trackstar", self.config, sums)
        products, own, theirs = self.products(queries, candidates, key, transform=transform)
        return cosines(products, own, theirs)

    def _corrected_by(self, scales: dict[str, Tensor]) -> Transform:
        projections: dict[str, list[Tensor]] = {}

        def transform(name: str, values: Tensor) -> Tensor:
            values = values * scales[name].to(values.device)
            if self.projection is None:
                return values
            shape = self.adapter.model.get_parameter(name).shape
            if name not in projections:
                projections[name] = self._projections(name, shape, values.device)
            values = values.reshape(len(values), *shape)
            for matrix in projections[name]:  # projects the first remaining axis, which becomes the last
                values = torch.tensordot(values, matrix, dims=([1], [1]))
            return values.flatten(1)

        return transform

    def _projections(self, name: str, shape: torch.Size, device: torch.device) -> list[Tensor]:
        assert self.projection is not None
        generator = torch.Generator().manual_seed(int(fingerprint(name, self.seed), 16) % 2**63)
        sides = [torch.randn(self.projection, side, generator=generator) for side in shape]
        return [side.div_(self.projection**0.5).to(device) for side in sides]
