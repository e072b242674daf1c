"""What a classifier says of queries and of their best candidates."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value

from hf_forward_inf.adapters.classification import ClassifierAdapter
from hf_forward_inf.adapters.labels import OneClass
from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.utils.models import evaluating, to_device
from hf_forward_inf.utils.processes import progress_bars

COLUMNS = {"prediction": "string", "probability": "float64"}
"""Columns that are added: the most probable class, by name where it has one, and its probability."""


def predict(tracer: Scorer, found: Attribution, k: int = 10) -> Attribution:
    """Add what the model predicts for the queries and for the best candidates of each, for the report.

    Args:
        tracer (`ForwardInf`): Of a classifier of one class a row.
        found (`Attribution`): The result.
        k (`int`, defaults to 10): Candidates of each query; of the others, predictions are null.

    Returns:
        `Attribution`: The same, with columns `prediction` and `probability` in queries and candidates.

    Raises:
        NotImplementedError: If the model is no classifier of one class a row.
    """
    adapter = tracer.adapter
    if not (isinstance(adapter, ClassifierAdapter) and isinstance(adapter.labels, OneClass)):
        raise NotImplementedError(f"{type(adapter).__name__} predicts no class of a row.")
    best = np.unique(np.concatenate([found.ranking(i)[:k] for i in range(len(found))]))
    queries = _with_predictions(adapter, found.queries, range(len(found)))
    return replace(found, queries=queries, candidates=_with_predictions(adapter, found.candidates, best.tolist()))


def _with_predictions(adapter: ClassifierAdapter, rows: Dataset, numbers: Iterable[int]) -> Dataset:
    columns = list(adapter.columns_in(rows.column_names))
    names = _names(adapter, rows, columns[-1])
    read = adapter.prepare(rows.select_columns(columns))
    found: dict[str, list[str | float | None]] = {name: [None] * len(rows) for name in COLUMNS}
    with evaluating(adapter.model), torch.no_grad():
        for number in numbers:  # one by one: not every model can be given padding
            features = adapter.encode(read[[number]])
            if any(features.get("unreadable", [])) or not features["terms"][0]:
                continue
            batch = to_device(adapter.collate(features), adapter.model)
            chances = adapter.logits(adapter.model, batch)[0].float().softmax(dim=-1)
            chance, likeliest = chances.max(dim=-1)
            found["prediction"][number] = names.get(int(likeliest), str(int(likeliest)))
            found["probability"][number] = float(chance)
    with progress_bars(False):
        bare = rows.remove_columns([name for name in COLUMNS if name in rows.column_names])
        for name, kind in COLUMNS.items():
            bare = bare.add_column(name, found[name], feature=Value(kind))
    return bare


def _names(adapter: ClassifierAdapter, rows: Dataset, column: str) -> dict[int, str]:
    """Return the names of classes by number: the model's, else those of the labels."""
    named = {number: name for name, number in getattr(adapter.labels, "names", {}).items()}
    kind = rows.features[column]
    return named or (dict(enumerate(kind.names)) if isinstance(kind, ClassLabel) else {})
