"""The training examples whose curvature stands for that of all."""

import warnings
from collections.abc import Iterator, Set
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from hf_forward_inf.adapters.base import Adapter, Batch
from hf_forward_inf.passes.candidate_pass import batches, encode
from hf_forward_inf.utils.models import to_device
from hf_forward_inf.utils.rows import sample_rows

MAX_BATCH_LENGTH = 2048
"""Padded tokens (or rows, where nothing is padded) in one batch."""


class Sample:
    """Some candidates, drawn at random, encoded, and sorted by length so that batches waste little on padding.

    Args:
        adapter (`Adapter`): Encodes and collates.
        candidates (`datasets.Dataset`): Where they are drawn from: the training data.
        size (`int`): How many; all candidates if there are no more.
        seed (`int`): Draws them.
        cache_dir (`Path`, *optional*): As in [`ForwardInf`].

    Raises:
        ValueError: If none of them can be read.
    """

    def __init__(self, adapter: Adapter, candidates: Dataset, size: int, seed: int, cache_dir: Path | None = None):
        self.adapter = adapter
        rows = sample_rows(candidates, size, seed)
        with warnings.catch_warnings():  # the candidates themselves are warned about
            warnings.simplefilter("ignore", UserWarning)
            drawn = encode(adapter, rows, "candidates", cache_dir, drop_unreadable=True)
        if not len(drawn):
            raise ValueError(
                f"Of {len(rows)} training examples drawn for the curvature none can be read: look at the rows, or "
                "give others as ForwardInf(training=...)."
            )
        self.lengths = adapter.lengths(drawn)
        order = np.lexsort(self.lengths.T[::-1])
        self.features, self.lengths = drawn.select(order), self.lengths[order]

    def __len__(self) -> int:
        return len(self.features)

    @property
    def fingerprint(self) -> str:
        """Names the rows, their encoding and their order."""
        return self.features._fingerprint

    def batches(self, names: Set[str] = frozenset()) -> Iterator[Batch]:
        """Give the batches, on the model's device.

        Args:
            names (`set[str]`, *optional*): The parameters that will be differentiated. If none of them is in the
                adapter's prefix, that is run here, without a graph.
        """
        for rows in batches(self.lengths, MAX_BATCH_LENGTH):
            batch = to_device(self.adapter.collate(self.features[rows]), self.adapter.model)
            if names and not names & self.adapter.shared_parameters():
                with torch.no_grad():
                    batch = self.adapter.run_shared(batch)
            yield batch
