"""Cosines of gradients as LESS takes them (Xia et al., 2024): a candidate's gradient as Adam would follow it."""

from typing import Any

import numpy as np
from datasets import Dataset

from hf_forward_inf.ascent.parameters import perturbed_names
from hf_forward_inf.baselines.gradients import Directions, GradientBaseline, cosines
from hf_forward_inf.curvature.example_gradients import ExampleGradients
from hf_forward_inf.curvature.sample import Sample
from hf_forward_inf.curvature.second_moments import estimated_second_moments
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import evaluating


class Less(GradientBaseline):
    """Scores a candidate by the cosine of the query's gradient and the candidate's, divided by Adam's second moments.

    LESS-like: one checkpoint, no momentum and no random projection, and second moments that are estimated from
    candidates where LESS reads the optimizer's.

    Args:
        sample (`int`, defaults to 1024): Candidates that second moments are estimated from.
        damping (`float`, defaults to 1e-3): Multiple of their mean that is added to all moments.
        seed (`int`, defaults to 0): Seed of the sample.
        **options: Of [`baselines.gradients.GradientBaseline`].
    """

    name = "less"

    def __init__(self, *, sample: int = 1024, damping: float = 1e-3, seed: int = 0, **options: Any):
        super().__init__(**options)
        self.sample, self.damping, self.seed = sample, damping, seed

    @property
    def config(self) -> dict[str, Any]:
        """Sample, damping, seed and modules."""
        return {"sample": self.sample, "damping": self.damping, "seed": self.seed, "modules": self.modules}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Return cosines, `[queries, candidates]`."""
        sample = Sample(self.adapter, candidates, self.sample, self.seed, self.cache_dir)
        with evaluating(self.adapter.model):
            moments = estimated_second_moments(sample, perturbed_names(self.adapter, self.modules or ["all"]))
        mean = sum(m.sum().item() for m in moments.values()) / sum(m.numel() for m in moments.values())
        scales = {name: (m + self.damping * mean).rsqrt() for name, m in moments.items()}

        def undone(raw: Directions, gradients: ExampleGradients) -> Directions:
            """Divide the queries' gradients by what all gradients are multiplied with."""
            return {name: values / scales[name].to(values.device) for name, values in raw.items()}

        key = fingerprint("less", self.config, candidates._fingerprint)
        products, own, theirs = self.products(
            queries, candidates, key, directions=undone,
            transform=lambda name, values: values * scales[name].to(values.device),
        )  # fmt: skip
        return cosines(products, own, theirs)
