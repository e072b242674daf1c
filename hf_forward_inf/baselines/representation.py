"""Representation similarity: candidates whose hidden states resemble the query's."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from hf_forward_inf.adapters import Adapter
from hf_forward_inf.adapters.base import Batch
from hf_forward_inf.baselines.base import ModelBaseline
from hf_forward_inf.passes.candidate_pass import MAX_BATCH_LENGTH, CandidatePass
from hf_forward_inf.utils.models import evaluating, to_device


class RepresentationSimilarity(ModelBaseline):
    """Scores a candidate by the cosine between its hidden state and the query's ([`Adapter.representation`]).

    Args:
        model (`torch.nn.Module`, *optional*): The trained model.
        processor (*optional*): Its tokenizer or image processor.
        adapter (`Adapter`, *optional*): Defaults to the adapter for this kind of model.
        cache_dir (`str` or `Path`, *optional*): As in [`ForwardInf`].
        max_batch_length (`int`, defaults to 4096): As in [`ForwardInf`].

    Raises:
        TypeError: If the adapter defines no representation.
    """

    name = "representation"

    def __init__(
        self,
        model: nn.Module | None = None,
        processor: Any = None,
        *,
        adapter: Adapter | None = None,
        cache_dir: str | Path | None = None,
        max_batch_length: int = MAX_BATCH_LENGTH,
    ):
        super().__init__(model, processor, adapter=adapter, cache_dir=cache_dir)
        self.max_batch_length = max_batch_length

    @classmethod
    def misfit(cls, adapter: Adapter) -> str | None:
        """Return why an adapter's examples have no representation; `None` if they have."""
        if type(adapter).representation is Adapter.representation:
            return f"{type(adapter).__name__} defines no representation: implement it to compare hidden states."
        return None

    @property
    def config(self) -> dict[str, Any]:
        """No options: an empty dictionary."""
        return {}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Return cosines, float32 `[queries, candidates]`.

        Raises:
            ValueError: If a column is missing, or a target is empty.
        """
        with evaluating(self.adapter.model):
            of_queries, of_candidates = self._states(queries), self._states(candidates)
        with np.errstate(invalid="ignore", divide="ignore"):
            of_queries, of_candidates = (
                states / np.linalg.norm(states, axis=0) for states in (of_queries, of_candidates)
            )
        return of_queries.T @ of_candidates

    def _states(self, rows: Dataset) -> np.ndarray:
        """Return each row's hidden state, `[features, rows]`."""
        run = CandidatePass(self.adapter, rows, cache_dir=self.cache_dir, max_batch_length=self.max_batch_length)

        def work(batch: Batch) -> np.ndarray:
            return self.adapter.representation(batch).cpu().numpy()

        columns = work(to_device(self.adapter.collate(run.encoded[:1]), self.adapter.model))
        return run.run(work, columns.shape[1], "hidden states", "hidden states")
