"""What Forward-INF's step does to first order: gradients of the candidates along the same direction."""

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.baselines.gradients import Directions, GradientBaseline, corrected
from hf_forward_inf.curvature.directions import direction_for
from hf_forward_inf.curvature.example_gradients import ExampleGradients
from hf_forward_inf.utils.fingerprints import fingerprint


class FirstOrder(GradientBaseline):
    """Scores a candidate by the product of its gradient with the direction in which Forward-INF steps for the query.

    The limit of Forward-INF's scores for a radius near 0, up to their scale, at the price of a gradient for every
    candidate: what finite steps add to it, or lose, is seen by comparison. With `direction="cg"` these are influence
    functions.

    Args:
        model (`torch.nn.Module`): The trained model.
        processor (*optional*): Its tokenizer.
        ascent (`AscentConfig`, *optional*): Direction, damping, sample; radius and mode count for nothing.
            What it leaves open is the adapter's choice.
        training (`datasets.Dataset`, *optional*): As in [`ForwardInf`].
        **options: `adapter`, `modules`, `cache_dir`, `max_batch_length` of [`baselines.gradients.GradientBaseline`].
    """

    name = "first_order"

    def __init__(
        self,
        model: nn.Module | None = None,
        processor: Any = None,
        *,
        ascent: AscentConfig | None = None,
        training: Dataset | None = None,
        **options: Any,
    ):
        super().__init__(model, processor, **options)
        self.ascent = (ascent or AscentConfig()).completed(self.adapter.default_ascent)
        self.training = training

    @property
    def config(self) -> dict[str, Any]:
        """Those options of the ascent that make its direction."""
        names = ("direction", "damping", "iterations", "tolerance", "sample", "second_moments", "seed")
        options = asdict(self.ascent)
        return {**{name: options[name] for name in names}, "modules": self.modules}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Products with the directions, `[queries, candidates]`."""
        training = candidates if self.training is None else self.training
        key = fingerprint("first order", self.config, training._fingerprint)
        return self.products(queries, candidates, key, directions=partial(self._directions, training), norms=False)[0]

    def self_influence(self, rows: Dataset) -> np.ndarray:
        """Tell each training example's product with its own direction, float32 `[rows]`: g . C^-1 g."""
        return self.own_products(rows, partial(self._directions, rows if self.training is None else self.training))

    def _directions(self, training: Dataset, raw: Directions, gradients: ExampleGradients) -> Directions:
        direction = direction_for(self.ascent, self.adapter, training, list(raw), self.cache_dir)
        return raw if direction is None else corrected(raw, gradients, direction.correction())
