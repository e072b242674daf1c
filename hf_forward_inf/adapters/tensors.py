"""Any torch module from a tensor to the logits of classes: a row is an array and a label."""

import inspect
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from safetensors.torch import load, save
from torch import Tensor, nn

from hf_forward_inf.adapters.base import Adapter, Batch, Forward, Rows
from hf_forward_inf.utils.callables import fingerprint_of_callable
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import device_of, evaluating
from hf_forward_inf.utils.validation import listed


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
        objective (`str`, defaults to `"cross_entropy"`): What is raised for a query, and whose rise is a candidate's
            score: `"cross_entropy"`, or `"margin"`, -log(p / (1 - p)) with p the label's probability. Steps are the
            same; but the cross-entropy of a candidate that the model is sure of hardly rises whatever happens to it,
            so that unsure ones come first for every query. Margins rise for both alike: take them to find copies (of
            51 in 10,000 CIFAR-10 images, a ResNet-20: first in 50 against 13, `recipes/leakage.py`).

    Raises:
        TypeError: If the model's forward takes no argument.
        ValueError: For an unknown objective.

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
        objective: Literal["cross_entropy", "margin"] = "cross_entropy",
    ):
        super().__init__(model)
        if objective not in ("cross_entropy", "margin"):
            raise ValueError(f"objective={objective!r} must be 'cross_entropy' or 'margin'.")
        arguments = list(inspect.signature(model.forward).parameters)
        if not arguments:
            raise TypeError(f"{type(model).__name__}.forward takes no argument, so no tensor can be given to it.")
        self.argument: str = getattr(model, "main_input_name", arguments[0])
        self.columns = (input_column, label_column)
        self.transform = transform
        self.objective = objective

    @property
    def cache_key(self) -> str:
        """Columns, the objective and the transform's code and values."""
        transform = None if self.transform is None else fingerprint_of_callable(self.transform)
        return fingerprint(self.columns, self.objective, transform)

    def prepare(self, rows: Dataset) -> Dataset:
        """Check all labels first.

        Raises:
            ValueError: If one is no class. It names the rows.
        """
        column, classes = self.columns[1], self.classes()
        labels = rows[column][:]
        odd = [i for i, label in enumerate(labels) if label is not None and not _is_label(label)]
        if odd:
            raise ValueError(
                f"Column `{column}` holds {labels[odd[0]]!r} in {listed(np.array(odd))}; a label is an integer from "
                "0. Dataset.class_encode_column makes integers of names."
            )
        beyond = [i for i, label in enumerate(labels) if label is not None and classes and label >= classes]
        if beyond:
            raise ValueError(
                f"Column `{column}` holds {labels[beyond[0]]} in {listed(np.array(beyond))}, but the model knows only "
                f"the classes 0 to {classes - 1}. Give a model with more classes, or drop the rows."
            )
        return rows

    def classes(self) -> int:
        """How many classes the model states, 0 if it states nothing; its logits are looked at in any case."""
        return 0

    def encode(self, rows: Rows) -> Rows:
        """Transform arrays; they are kept as bytes, which Arrow reads without a copy.

        A row whose label is missing has nothing to predict.
        """
        return {"input": [save({"input": self.array(value)}) for value in rows[self.columns[0]]], **self.targets(rows)}

    def targets(self, rows: Rows) -> Rows:
        """Read labels; where one is missing there is nothing to predict."""
        labels = rows[self.columns[1]]
        return {
            "label": [0 if label is None else int(label) for label in labels],
            "terms": [int(label is not None) for label in labels],
            "truncated": [False] * len(labels),
        }

    def array(self, value: Any) -> Tensor:
        """Make the model's input, without the batch axis, of what a row holds."""
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
        return {"input": inputs, "label": torch.tensor(features["label"]), "highest": max(features["label"])}

    def term_losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Cross-entropy of every row's label, or minus its margin, float64 `[rows, 1]`."""
        margins = margins_of(self.logits(forward, batch), batch["label"])
        return (-margins if self.objective == "margin" else cross_entropies(margins))[:, None]

    def logits(self, forward: Forward, batch: Batch) -> Tensor:
        """Run the model: logits `[rows, classes]`.

        Raises:
            ValueError: If it can't take arrays of this shape, gives no logits, or knows no such label.
        """
        model = type(self.model).__name__
        try:
            output = forward(**{self.argument: batch["input"]})
        except RuntimeError as error:
            if should_reduce_batch_size(error):
                raise
            shape = tuple(batch["input"].shape[1:])
            raise ValueError(f"{model} can't take what `{self.columns[0]}` holds, shape {shape}: {error}") from error
        logits = output if isinstance(output, Tensor) else output.logits
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(
                f"{model} gives a tensor of shape {tuple(logits.shape)} for {len(batch['label'])} rows; logits have "
                "the shape [rows, classes], of 2 classes or more."
            )
        if batch["highest"] >= logits.shape[1]:
            raise ValueError(
                f"Column `{self.columns[1]}` holds {batch['highest']}, but the model knows only the classes 0 to "
                f"{logits.shape[1] - 1}."
            )
        return logits

    def outputs(self, forward: Forward, batch: Batch) -> Tensor:
        """Logits less their mean, which changes no probability, `[rows, classes]`."""
        logits = self.logits(forward, batch).float()
        return logits - logits.mean(dim=1, keepdim=True)

    def outputs_and_loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits, `[rows, classes]`, and their cross-entropy."""
        return self.logits(forward, batch).float(), partial(F.cross_entropy, target=batch["label"], reduction="sum")

    def default_ascent(self, direction: str | None = None) -> dict[str, Any]:
        """Conjugate gradients: they predict retraining far better than the gradient (`recipes/lds.py`)."""
        if direction not in (None, "cg"):
            return {}
        return {"direction": "cg", "damping": 0.03, "radius": 0.3, "sample": 1024}

    @torch.no_grad()
    def representation(self, batch: Batch, forward: Forward | None = None) -> Tensor:
        """What the last linear layer reads, `[rows, features]`; of a perturbed model, if its forward is given."""
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

    @torch.no_grad()
    def answer(self, rows: Rows) -> list[int]:
        """Let the model classify: the class of the highest logit, one a row."""
        values = rows[self.columns[0]]
        features = self.encode({self.columns[0]: values, self.columns[1]: [0] * len(values)})
        device = device_of(self.model)
        batch = self.collate(features)
        batch["input"], batch["label"] = (batch[name].to(device) for name in ("input", "label"))
        with evaluating(self.model):
            return self.logits(self.model, batch).argmax(dim=1).tolist()


def margins_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Give log(p / (1 - p)), p the probability of a row's label: float64 (float32 where a device has no better)."""
    logits = logits.float() if logits.device.type == "mps" else logits.double()
    own = labels[:, None]
    return logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).logsumexp(dim=1)


def cross_entropies(margins: Tensor) -> Tensor:
    """Give the cross-entropy -log p of margins, `[rows]`.

    As softplus(-margin) it tells losses down to 1e-308 apart, with their gradients; log_softmax gives 0 as soon as
    float32 rounds p to 1, and examples that the model has memorised are there.
    """
    return F.softplus(-margins)


def _is_label(label: Any) -> bool:
    return isinstance(label, Integral) and not isinstance(label, bool) and int(label) >= 0
