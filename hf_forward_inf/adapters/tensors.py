"""Any torch module from a tensor to the logits of classes: a row is an array and a label."""

import inspect
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets.fingerprint import Hasher
from torch import Tensor, nn

from hf_forward_inf.adapters.base import Adapter, Batch, Forward, Rows
from hf_forward_inf.fingerprints import fingerprint


class TensorAdapter(Adapter):
    """Cross-entropy of a row's label under the logits that the model gives for its array.

    Arrays are of one shape, so nothing is padded, and `max_batch_length` counts rows.

    Args:
        model (`torch.nn.Module`): From a tensor `[rows, ...]`, its first argument, to logits `[rows, classes]`.
        input_column (`str`, defaults to `"x"`): Column of arrays: numbers in lists of any depth, or whatever
            `transform` reads.
        label_column (`str`, defaults to `"label"`): Column of labels, integers from 0.
        transform (`Callable`, *optional*): Makes a row's array of what the input column holds. Without randomness:
            a candidate is to have one loss.

    Raises:
        TypeError: If the model's forward takes no argument.

    Example:
        >>> tracer = ForwardInf(adapter=TensorAdapter(network))
        >>> found = tracer.trace(queries, candidates)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_column: str = "x",
        label_column: str = "label",
        transform: Callable[[Any], Any] | None = None,
    ):
        super().__init__(model)
        arguments = list(inspect.signature(model.forward).parameters)
        if not arguments:
            raise TypeError(f"{type(model).__name__}.forward takes no argument, so no tensor can be given to it.")
        self.argument = arguments[0]
        self.columns = (input_column, label_column)
        self.transform = transform

    @property
    def settings(self) -> str:
        """Columns and the transform's code."""
        return fingerprint(self.columns, None if self.transform is None else Hasher.hash(self.transform))

    def encode(self, rows: Rows) -> Rows:
        """Transform arrays, and check labels; a row whose label is missing has nothing to predict."""
        values, labels = (rows[column] for column in self.columns)
        for label in labels:
            if label is not None and (not isinstance(label, Integral) or isinstance(label, bool) or label < 0):
                raise ValueError(f"Column `{self.columns[1]}` holds {label!r}; a label is an integer from 0.")
        arrays = values if self.transform is None else [np.asarray(self.transform(value)).tolist() for value in values]
        return {
            "input": arrays,
            "label": [0 if label is None else int(label) for label in labels],
            "terms": [int(label is not None) for label in labels],
            "truncated": [False] * len(labels),
        }

    def lengths(self, features: Rows) -> np.ndarray:
        """One for every row: nothing is padded."""
        return np.ones((len(features["terms"]), 1), dtype=int)

    def collate(self, features: Rows) -> Batch:
        """Stack arrays; numbers with a fraction take the model's precision.

        Raises:
            ValueError: If the arrays are of several shapes.
        """
        shapes = sorted({np.shape(value) for value in features["input"]})
        if len(shapes) > 1:
            raise ValueError(
                f"Column `{self.columns[0]}` holds arrays of the shapes {shapes[0]} and {shapes[1]}: "
                "bring them to one, for example with transform=..."
            )
        inputs = torch.tensor(features["input"])
        if inputs.is_floating_point():
            inputs = inputs.to(next((p.dtype for p in self.model.parameters() if p.is_floating_point()), inputs.dtype))
        return {"input": inputs, "label": torch.tensor(features["label"])}

    def term_losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Cross-entropy of every row's label, `[rows, 1]`."""
        return F.cross_entropy(self._logits(forward, batch), batch["label"], reduction="none")[:, None]

    def _logits(self, forward: Forward, batch: Batch) -> Tensor:
        logits = forward(**{self.argument: batch["input"]}).float()
        if logits.dim() != 2:
            raise ValueError(
                f"{type(self.model).__name__} gives a tensor of shape {tuple(logits.shape)} for {len(batch['label'])} "
                "rows; logits have the shape [rows, classes]."
            )
        if batch["label"].max() >= logits.shape[1]:
            raise ValueError(
                f"Column `{self.columns[1]}` holds {batch['label'].max().item()}, but the model knows only the "
                f"classes 0 to {logits.shape[1] - 1}."
            )
        return logits

    def predictions(self, forward: Forward, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits, `[rows, classes]`, and their cross-entropy."""
        return self._logits(forward, batch), partial(F.cross_entropy, target=batch["label"], reduction="sum")

    def default_ascent(self) -> dict[str, Any]:
        """Conjugate gradients: they foretell retraining far better than the gradient (`recipes/lds.py`)."""
        return {"direction": "cg", "damping": 0.03, "radius": 0.3, "sample": 1024}

    @torch.no_grad()
    def representation(self, batch: Batch) -> Tensor:
        """What the last linear layer reads, `[rows, features]`."""
        layers = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise NotImplementedError(
                f"{type(self.model).__name__} has no linear layer whose input could be compared."
            )
        read: list[Tensor] = []
        handle = layers[-1].register_forward_hook(lambda module, args, output: read.append(args[0]))
        try:
            self._logits(self.model, batch)
        finally:
            handle.remove()
        return read[-1].float().flatten(1)
