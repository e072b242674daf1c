"""What baselines share: one `trace`, and one constructor for those that run the model."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from hf_forward_inf.adapters import Adapter, choose_adapter
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.data.inputs import Given, read_inputs


class Baseline(ABC):
    """An attributor that computes all scores in one call: a subclass has `name`, `config` and `score`.

    Every baseline is made as `Baseline(model, processor, *, adapter=..., cache_dir=..., **options)`; those that don't
    run the model can be made without one.
    """

    name: str

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Options that the scores depend on, as JSON can hold them."""

    @abstractmethod
    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Return float32 scores, `[queries, candidates]`, higher for a stronger proponent, NaN for no score."""

    def trace(self, queries: Given, candidates: Given, top_k: int | None = None) -> Attribution:
        """Score every candidate for every query.

        Args:
            queries (`datasets.Dataset`): Outputs to explain, one a row; or what else [`data.as_dataset`] reads.
            candidates (`datasets.Dataset`): Training examples that may have caused them; as `queries`.
            top_k (`int`, *optional*): Number of best candidates returned for each query. Defaults to all.

        Returns:
            `Attribution`: float32 scores, `[queries, candidates]` or `[queries, top_k]`.

        Raises:
            TypeError: If queries or candidates are not a `datasets.Dataset`.
            ValueError: If there are no rows, or a column is missing.
        """
        queries, candidates = read_inputs(getattr(self, "adapter", None), queries, candidates)
        scores = self.score(queries, candidates)
        return Attribution(scores, queries, candidates, method=self.name, config=self.config).keep(top_k)

    @classmethod
    def misfit(cls, adapter: Adapter) -> str | None:
        """Return why the method can't trace an adapter's model, as a sentence; `None` if it can."""
        return None


class ModelBaseline(Baseline):
    """A baseline that runs the model.

    Args:
        model (`torch.nn.Module`, *optional*): The trained model.
        processor (*optional*): Its tokenizer or image processor.
        adapter (`Adapter`, *optional*): Defaults to the adapter for this kind of model.
        cache_dir (`str` or `Path`, *optional*): As in [`ForwardInf`].

    Raises:
        TypeError: If there is neither a model nor an adapter, or the method can't trace this kind of model.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        processor: Any = None,
        *,
        adapter: Adapter | None = None,
        cache_dir: str | Path | None = None,
    ):
        self.adapter = choose_adapter(model, processor, adapter, type(self).__name__)
        if reason := self.misfit(self.adapter):
            raise TypeError(reason)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
