"""Contrast: a query may hold what should have been said, so that the question is why this rather than that."""

from collections.abc import Iterable, Set
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_forward_inf.adapters.base import Adapter, Batch, Forward, Rows
from hf_forward_inf.adapters.pairs import half, halves, interleaved, named

CONTRAST = "contrast"
"""Feature and batch entry: 1 for queries that have a contrast, else 0."""
HALF = "contrast/"
"""Begins the names of the contrast's own features."""


class Contrast(Adapter):
    """Queries whose loss is that of their output minus that of their contrast.

    Ascent on it makes the output less likely than the contrast. What both have in common (a topic, a style) cancels to
    first order, so that candidates score which speak for the one and against the other. A query without a contrast
    (`None`) has its ordinary loss.

    Args:
        adapter (`Adapter`): Reads both halves.
        column (`str`, defaults to `"contrast"`): The queries' column of contrasts.
    """

    def __init__(self, adapter: Adapter, column: str = CONTRAST):
        super().__init__(adapter.model)
        self.adapter, self.column = adapter, column
        self.columns = (column, *adapter.columns)

    @property
    def cache_key(self) -> str:
        """That of the adapter, and the column."""
        return f"{self.adapter.cache_key} against {self.column}"

    def columns_in(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the adapter's columns and that of contrasts."""
        return (self.column, *self.adapter.columns_in(name for name in names if name != self.column))

    def prepare(self, rows: Dataset) -> Dataset:
        """Prepare them as the adapter does."""
        return self.adapter.prepare(rows)

    def encode(self, rows: Rows) -> Rows:
        """Encode every query twice: with its output, and with its contrast in the output's place."""
        contrasts = rows[self.column]
        plain = {name: values for name, values in rows.items() if name != self.column}
        said, other = map(self.adapter.encode, (plain, self.adapter.with_outputs(plain, contrasts)))
        given = [contrast is not None for contrast in contrasts]
        own = [name for name in other if name not in ("truncated", "unreadable")]
        reasons = list(said.get("unreadable") or [""] * len(given))
        other_reasons = list(other.get("unreadable") or [""] * len(given))
        for i in np.flatnonzero(given):
            if other_reasons[i]:
                reasons[i] = reasons[i] or f"its `{self.column}`: {other_reasons[i]}"
            elif not other["terms"][i]:
                reasons[i] = reasons[i] or f"its `{self.column}` is empty"
            elif all(said[name][i] == other[name][i] for name in own):
                reasons[i] = reasons[i] or f"its `{self.column}` is the output itself"
        return {
            **said,
            **named({name: other[name] for name in own}, HALF),
            CONTRAST: [float(one) for one in given],
            "truncated": [a or b for a, b in zip(said["truncated"], other["truncated"], strict=True)],
            "unreadable": reasons,
        }

    def lengths(self, features: Rows | Dataset) -> np.ndarray:
        """Return the outputs' lengths."""
        return self.adapter.lengths(features)

    def collate(self, features: Rows) -> Batch:
        """Pad both halves of the queries together, each query's contrast right behind its output."""
        pairs = interleaved(features, half(features, HALF))
        # First, so that whoever counts rows finds that of queries.
        return {CONTRAST: torch.tensor(features[CONTRAST]), **self.adapter.collate(pairs)}

    def term_losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Return the terms of the output's loss, then those of the contrast's, negative: `[queries, 2 x terms]`."""
        pairs = {name: value for name, value in batch.items() if name != CONTRAST}
        said, other = halves(self.adapter.term_losses(forward, pairs))
        return torch.cat([said, -batch[CONTRAST][:, None] * other], dim=1)

    def shared_parameters(self) -> Any:
        """Return those of the adapter."""
        return self.adapter.shared_parameters()

    def with_shared(self, batch: Batch, names: Set[str]) -> Batch:
        """Run it for both halves."""
        pairs = {name: value for name, value in batch.items() if name != CONTRAST}
        return {CONTRAST: batch[CONTRAST], **self.adapter.with_shared(pairs, names)}


def query_adapter(adapter: Adapter, columns: Iterable[str]) -> Adapter:
    """Return the adapter for queries that have these columns: with contrasts, where there is a column of them."""
    columns = list(columns)
    adapter = adapter.for_queries(columns)
    column = next((name for name in adapter.contrast_columns if name in columns), None)
    if column is None or column in adapter.columns_in(columns):
        return adapter
    return Contrast(adapter, column)


def encoded_adapter(adapter: Adapter, features: Iterable[str]) -> Adapter:
    """Return the adapter that collates what [`query_adapter`] encoded, by the features that it has."""
    features = list(features)
    adapter = adapter.for_encoded(features)
    return Contrast(adapter) if CONTRAST in features else adapter
