"""The first-order limit of Forward-INF: gradients of the candidates along the same direction."""

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.baselines.gradients import Directions, GradientBaseline, by_query, corrected
from hf_forward_inf.curvature.directions import direction_for
from hf_forward_inf.curvature.example_gradients import ExampleGradients
from hf_forward_inf.utils.fingerprints import fingerprint


class FirstOrder(GradientBaseline):
    """Scores a candidate by the product of its gradient with the direction of Forward-INF's step for the query.

    Up to their scale, these are Forward-INF's scores in the limit of radius 0, computed with a gradient for every
    candidate: comparing both shows what a finite step adds or loses. With `direction="cg"` they are influence
    functions.

    Args:
        model (`torch.nn.Module`, *optional*): The trained model.
        processor (*optional*): Its tokenizer or image processor.
        ascent (`AscentConfig`, *optional*): Direction, damping, sample; radius, steps and mode are ignored. Unset
            fields take the adapter's defaults.
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
        """The options of the ascent that its direction depends on, and modules."""
        names = ("direction", "damping", "iterations", "tolerance", "sample", "memory", "step", "seed")
        options = asdict(self.ascent)
        return {**{name: options[name] for name in names}, "modules": self.modules}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Return products with the directions, `[queries, candidates]`."""
        training = candidates if self.training is None else self.training
        key = fingerprint("first order", self.config, training._fingerprint)
        return self.products(queries, candidates, key, directions=partial(self._directions, training), norms=False)[0]

    def self_influence(self, rows: Dataset) -> np.ndarray:
        """Return each training example's product with its own direction, float32 `[rows]`: g . C^-1 g."""
        return self.own_products(rows, partial(self._directions, rows if self.training is None else self.training))

    def _directions(self, training: Dataset, raw: Directions, gradients: ExampleGradients) -> Directions:
        direction = direction_for(self.ascent, self.adapter, training, list(raw), self.cache_dir)
        if direction is None:
            return raw
        return corrected(raw, gradients, direction.correction(by_query(raw, gradients)))
