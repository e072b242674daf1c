"""Scores that know nothing: what every measure is to be compared with."""

import numpy as np
from datasets import Dataset

from hf_forward_inf.attribution import Attribution


class Random:
    """Scores drawn from a normal distribution.

    Args:
        seed (`int`, defaults to 0): Draws them.
    """

    name = "random"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def trace(self, queries: Dataset, candidates: Dataset, top_k: int | None = None) -> Attribution:
        """Score every candidate for every query at random, `[queries, candidates]`."""
        drawn = np.random.default_rng(self.seed).standard_normal((len(queries), len(candidates)))
        return Attribution(drawn.astype(np.float32), queries, candidates, method=self.name).keep(top_k)
