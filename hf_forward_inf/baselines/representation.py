"""Representation similarity: candidates that the model sees as it sees the query."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from hf_forward_inf.adapters import Adapter, choose_adapter
from hf_forward_inf.adapters.base import Batch
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.passes.candidate_pass import MAX_BATCH_LENGTH, CandidatePass
from hf_forward_inf.utils.models import evaluating, to_device


class RepresentationSimilarity:
    """Scores a candidate by the cosine of its hidden state with the query's (`Adapter.representation`).

    Args:
        model (`torch.nn.Module`): The trained model.
        processor (*optional*): Its tokenizer.
        adapter (`Adapter`, *optional*): Defaults to the one that knows this kind of model.
        cache_dir (`Path`, *optional*): As in [`ForwardInf`].
        max_batch_length (`int`, defaults to 4096): As in [`ForwardInf`].
    """

    name = "representation_similarity"

    def __init__(
        self,
        model: nn.Module | None = None,
        processor: Any = None,
        *,
        adapter: Adapter | None = None,
        cache_dir: str | Path | None = None,
        max_batch_length: int = MAX_BATCH_LENGTH,
    ):
        self.adapter = choose_adapter(model, processor, adapter, type(self).__name__)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.max_batch_length = max_batch_length

    def trace(self, queries: Dataset, candidates: Dataset, top_k: int | None = None) -> Attribution:
        """Score every candidate for every query: cosines, float32 `[queries, candidates]`.

        Raises:
            ValueError: If there are no rows, a column is missing, or a target is empty.
        """
        with evaluating(self.adapter.model):
            mine, theirs = self._states(queries), self._states(candidates)
        with np.errstate(invalid="ignore", divide="ignore"):
            mine, theirs = (states / np.linalg.norm(states, axis=0) for states in (mine, theirs))
        return Attribution(mine.T @ theirs, queries, candidates, method=self.name).keep(top_k)

    def _states(self, rows: Dataset) -> np.ndarray:
        run = CandidatePass(self.adapter, rows, cache_dir=self.cache_dir, max_batch_length=self.max_batch_length)

        def work(batch: Batch) -> np.ndarray:
            return self.adapter.representation(batch).cpu().numpy()

        columns = work(to_device(self.adapter.collate(run.encoded[:1]), self.adapter.model))
        return run.run(work, columns.shape[1], "hidden states", "hidden states")
