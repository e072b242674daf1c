"""Any torch module from a tensor to the logits of classes: a row is an array and a label."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from safetensors.torch import load, save
from torch import Tensor, nn

from hf_forward_inf.adapters.base import Batch, Forward, Rows
from hf_forward_inf.adapters.classification import ClassifierAdapter
from hf_forward_inf.utils.callables import fingerprint_of_callable
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import evaluating, to_device


class TensorAdapter(ClassifierAdapter):
    """Cross-entropy of a row's label under the logits that the model returns for its array.

    Arrays are of one shape, so nothing is padded, and `max_batch_length` counts rows.

    Args:
        model (`torch.nn.Module`): From a tensor `[rows, ...]`, its first argument, to logits `[rows, classes]`.
        input_column (`str`, defaults to `"x"`): Column of arrays: numbers in lists of any depth, or whatever
            `transform` reads.
        label_column (`str`, defaults to `"label"`): Column of labels, integers from 0.
        transform (`Callable`, *optional*): Turns what the input column holds into a row's array. It must not draw
            at random: a candidate has one loss.
        objective (`str`, defaults to `"cross_entropy"`): `"cross_entropy"` or `"margin"` ([`ClassifierAdapter`]).

    Raises:
        TypeError: If the model's forward takes no argument, or reads tokens.
        ValueError: For an unknown objective.

    Example:
        >>> tracer = ForwardInf(adapter=TensorAdapter(network))
        >>> found = tracer.trace(queries, candidates)
    """

    answers_queries = True

    def __init__(
        self,
        model: nn.Module,
        *,
        input_column: str = "x",
        label_column: str = "label",
        transform: Callable[[Any], Any] | None = None,
        objective: Literal["cross_entropy", "margin"] = "cross_entropy",
    ):
        super().__init__(model, objective)
        arguments = list(inspect.signature(self.model.forward).parameters)
        if not arguments:
            raise TypeError(f"{type(model).__name__}.forward takes no argument, so no tensor can be passed to it.")
        self.argument: str = getattr(model, "main_input_name", arguments[0])
        if self.argument == "input_ids":
            raise TypeError(
                f"{type(self.model).__name__} reads tokens, and padding must be masked: give ForwardInf the model "
                "and its tokenizer, or write an adapter."
            )
        self.columns = (input_column, label_column)
        self.transform = transform

    @property
    def cache_key(self) -> str:
        """Columns, the objective and the transform's code and values."""
        transform = None if self.transform is None else fingerprint_of_callable(self.transform)
        return fingerprint(self.columns, self.objective, transform)

    def encode(self, rows: Rows) -> Rows:
        """Transform arrays; they are stored as bytes, which Arrow reads without a copy.

        A row whose label is missing has nothing to predict.
        """
        arrays = [save({"input": self.array(value)}) for value in rows[self.columns[0]]]
        return {"input": arrays, **self.targets(rows[self.columns[1]])}

    def array(self, value: Any) -> Tensor:
        """Return the model's input for what a row holds, without the batch axis."""
        found = np.asarray(value if self.transform is None else self.transform(value))
        if found.dtype.kind not in "biuf":
            raise ValueError(f"Column `{self.columns[0]}` holds {str(value)[:60]}, which is no array of numbers.")
        return torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32 if found.dtype.kind == "f" else None))

    def lengths(self, features: Rows | Dataset) -> np.ndarray:
        """One for every row: nothing is padded."""
        return np.ones((len(features["terms"]), 1), dtype=int)

    def collate(self, features: Rows) -> Batch:
        """Stack arrays; numbers with a fraction take the model's precision.

        Raises:
            ValueError: If the arrays are of several shapes.
        """
        arrays = [load(bytes(value))["input"] for value in features["input"]]
        shapes = sorted({tuple(array.shape) for array in arrays})
        if len(shapes) > 1:
            raise ValueError(
                f"Column `{self.columns[0]}` holds arrays of the shapes {shapes[0]} and {shapes[1]}: "
                "bring them to one, for example with transform=..."
            )
        inputs = torch.stack(arrays)
        if inputs.is_floating_point():
            inputs = inputs.to(next((p.dtype for p in self.model.parameters() if p.is_floating_point()), inputs.dtype))
        return {"input": inputs, **self.labels.collate(features["label"])}

    def logits(self, forward: Forward, batch: Batch) -> Tensor:
        """Run the model: logits `[rows, classes]`.

        Raises:
            ValueError: If it can't take arrays of this shape.
        """
        try:
            output = forward(**{self.argument: batch["input"]})
        except RuntimeError as error:
            if should_reduce_batch_size(error):
                raise
            model, shape = type(self.model).__name__, tuple(batch["input"].shape[1:])
            raise ValueError(f"{model} can't take what `{self.columns[0]}` holds, shape {shape}: {error}") from error
        return output if isinstance(output, Tensor) else output.logits

    def default_ascent(self, direction: str | None = None) -> dict[str, Any]:
        """Three preconditioned products, which predict retraining far better than the gradient (`recipes/lds.py`).

        On the digits and a perceptron (60 halves x 2 seeds, 80 queries) their LDS is .778, and .743 and .752 with a
        damping of .03 and .003, .757 with two products, .777 with five, .675 with a sample of 256; that of 10 plain
        products with a damping of .03 is .718, along K-FAC's direction .662.
        """
        if direction not in (None, "cg", "pcg"):
            return {}
        damping = 0.03 if direction == "cg" else 0.01
        return {"direction": direction or "pcg", "damping": damping, "radius": 0.3, "sample": 1024}

    @torch.no_grad()
    def representation(self, batch: Batch, forward: Forward | None = None) -> Tensor:
        """Return what the last linear layer reads, `[rows, features]`; under a perturbed model, given its forward."""
        layers = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise NotImplementedError(
                f"{type(self.model).__name__} has no linear layer whose input could be compared."
            )
        read: list[Tensor] = []
        handle = layers[-1].register_forward_hook(lambda module, args, output: read.append(args[0]))
        try:
            self.logits(forward or self.model, batch)
        finally:
            handle.remove()
        return read[-1].float().flatten(1)

    def with_answers(self, queries: Dataset, **options: Any) -> Dataset:
        """Return the queries with the model's classes as labels, if they have no column of labels."""
        column = self.columns[1]
        if column in queries.column_names:
            return queries
        return queries.add_column(column, self.answer(self._undecoded(queries)[:]))

    def _undecoded(self, rows: Dataset) -> Dataset:
        """Return rows in the form in which [`answer`] reads them."""
        return rows

    @torch.no_grad()
    def answer(self, rows: Rows) -> list[Any]:
        """Classify rows that have no label yet: the most probable class of each, by number."""
        values, kind = rows[self.columns[0]], self.labels
        features = self.encode({self.columns[0]: values, self.columns[1]: [kind.blank] * len(values)})
        batch = to_device(self.collate(features), self.model)
        with evaluating(self.model):
            return kind.predicted(self.logits(self.model, batch))
