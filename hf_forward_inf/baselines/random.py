"""Random scores: the level of chance for every measure."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from hf_forward_inf.adapters import Adapter
from hf_forward_inf.baselines.base import Baseline


class Random(Baseline):
    """Draws scores from a standard normal distribution.

    Args:
        model, processor, adapter, cache_dir (*optional*): Accepted as by every baseline, and ignored.
        seed (`int`, defaults to 0): Seed of the draw.
    """

    name = "random"

    def __init__(
        self,
        model: nn.Module | None = None,
        processor: Any = None,
        *,
        adapter: Adapter | None = None,
        cache_dir: str | Path | None = None,
        seed: int = 0,
    ):
        self.seed = seed

    @property
    def config(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": self.seed}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Return random scores, `[queries, candidates]`."""
        drawn = np.random.default_rng(self.seed).standard_normal((len(queries), len(candidates)))
        return drawn.astype(np.float32)
