"""The training examples on which the curvature is estimated."""

import warnings
from collections.abc import Iterator, Set
from pathlib import Path

import numpy as np
from datasets import Dataset

from hf_forward_inf.adapters.base import Adapter, Batch
from hf_forward_inf.passes.candidate_pass import batches, encode
from hf_forward_inf.utils.models import to_device
from hf_forward_inf.utils.rows import sample_rows

MAX_BATCH_LENGTH = 2048
"""Padded tokens in one batch (rows, if nothing is padded)."""


class Sample:
    """Some training examples, drawn at random, encoded, and sorted by length so that batches need little padding.

    Args:
        adapter (`Adapter`): Encodes and collates.
        candidates (`datasets.Dataset`): The training data.
        size (`int`): How many rows to draw; all of them if there are fewer.
        seed (`int`): Seed of the draw.
        cache_dir (`Path`, *optional*): As in [`ForwardInf`].

    Raises:
        ValueError: If none of the rows can be read.
    """

    def __init__(self, adapter: Adapter, candidates: Dataset, size: int, seed: int, cache_dir: Path | None = None):
        self.adapter = adapter
        rows = sample_rows(candidates, size, seed)
        with warnings.catch_warnings():  # the loss pass warns about candidates
            warnings.simplefilter("ignore", UserWarning)
            drawn = encode(adapter, rows, "candidates", cache_dir, drop_unreadable=True)
        if not len(drawn):
            raise ValueError(
                f"None of the {len(rows)} training examples drawn for the curvature can be read: check the rows, or "
                "give others as ForwardInf(training=...)."
            )
        self.lengths = adapter.lengths(drawn)
        order = np.lexsort(self.lengths.T[::-1])
        self.features, self.lengths = drawn.select(order), self.lengths[order]

    def __len__(self) -> int:
        return len(self.features)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the rows, their encoding and their order."""
        return self.features._fingerprint

    def batches(self, names: Set[str] = frozenset(), length: int = MAX_BATCH_LENGTH) -> Iterator[Batch]:
        """Yield the batches, on the model's device.

        Args:
            names (`set[str]`, *optional*): The parameters to differentiate. If none of them belongs to the adapter's
                shared part, that part is run here, without a graph.
            length (`int`, defaults to [`MAX_BATCH_LENGTH`]): Padded tokens in one batch at most.
        """
        limit = min(length, MAX_BATCH_LENGTH) if self.adapter.can_batch(self.features, self.lengths) else 1
        for rows in batches(self.lengths, limit):
            batch = to_device(self.adapter.collate(self.features[rows]), self.adapter.model)
            yield self.adapter.with_shared(batch, names) if names else batch
