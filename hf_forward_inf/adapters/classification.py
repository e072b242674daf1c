"""What all classifiers share: labels, and the loss of the logits that a model returns for a row."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_forward_inf.adapters.base import Adapter, Batch, Forward, Rows
from hf_forward_inf.adapters.labels import LabelKind, label_kind, replaced


class ClassifierAdapter(Adapter):
    """The loss of a row's label under the logits that the model returns for the rest of the row.

    Labels are what `model.config.problem_type` says ([`labels.label_kind`]): one class a row, any number of classes,
    or numbers. The loss of a row is the one that transformers computes for it alone.

    Classes go by name where both sides have names: a `ClassLabel` column whose names are the model's `id2label` in
    another order, and a column of names, are mapped to the model's numbers. Where none of the names agree, numbers are
    taken as they are, with a warning; where only some do, rows of the others are refused.

    Args:
        model (`torch.nn.Module`): The classifier.
        objective (`str`, defaults to `"cross_entropy"`): What is raised for a query, and whose rise is a candidate's
            score: `"cross_entropy"`, or `"margin"`, -log(p / (1 - p)) with p the label's probability. Steps are the
            same; but the cross-entropy of a candidate that the model is sure of hardly rises whatever happens to it,
            so that unsure ones come first for every query. Margins rise for both alike: take them to find copies (of
            51 in 10,000 CIFAR-10 images, a ResNet-20: first in 50 against 13, `recipes/leakage.py`), shortcuts and
            subclasses; both together: [`baselines.Ensemble`].

    Raises:
        ValueError: For an unknown objective.
    """

    def __init__(self, model: nn.Module, objective: Literal["cross_entropy", "margin"] = "cross_entropy"):
        super().__init__(model)
        if objective not in ("cross_entropy", "margin"):
            raise ValueError(f"objective={objective!r} must be 'cross_entropy' or 'margin'.")
        self.objective = objective

    @property
    def labels(self) -> LabelKind:
        """What the labels are, and their loss."""
        return label_kind(self.model, self.objective == "margin")

    def labels_of(self, batch: Batch) -> LabelKind:
        """Return what the labels of a batch are, where that depends on its rows."""
        return self.labels

    @abstractmethod
    def logits(self, forward: Forward, batch: Batch) -> Tensor:
        """Run the model: logits `[rows, classes]`."""

    def prepare(self, rows: Dataset) -> Dataset:
        """Check all labels first, and number classes as the model does.

        Raises:
            ValueError: If there is a label that the model can't have. It names the rows.
        """
        column = self.columns_in(rows.column_names)[-1]
        values = rows.with_format(None)[column][:]
        return replaced(rows, column, self.labels.read(values, rows.features[column], column))

    def targets(self, values: list[object]) -> Rows:
        """Return the features of labels; where one is missing there is nothing to predict."""
        kind = self.labels
        return {
            "label": [kind.blank if value is None else value for value in values],
            "terms": [kind.terms(value) for value in values],
            "truncated": [False] * len(values),
        }

    def term_losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Compute the loss of every row's label, `[rows, 1]`, or of each of the model's outputs, `[rows, outputs]`."""
        return self.labels_of(batch).losses(self.checked_logits(forward, batch), batch["label"])

    def checked_logits(self, forward: Forward, batch: Batch) -> Tensor:
        """Run the model, and refuse logits that don't fit the labels: raise a `ValueError`."""
        logits = self.logits(forward, batch)
        self.labels_of(batch).check(logits, batch, type(self.model).__name__, self.columns[-1])
        return logits

    def outputs(self, forward: Forward, batch: Batch) -> Tensor:
        """Compute logits; of classes that exclude each other less their mean, which changes no probability."""
        logits = self.logits(forward, batch).float()
        exclusive = "highest" in batch
        return logits - logits.mean(dim=1, keepdim=True) if exclusive else logits

    def outputs_and_loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Compute logits, `[rows, classes]`, and return with them the function that gives their loss."""
        return self.checked_logits(forward, batch).float(), self.labels_of(batch).summed(batch["label"])

    def sampled_output_gradients(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Compute the loss's gradient by the outputs, for labels drawn from the model's own predictions."""
        return self.labels.sampled(outputs, generator)

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return how far each prediction has moved, as the kind of labels says, `[rows]`."""
        return self.labels.divergence(before, after)

    def term_texts(self, features: Rows) -> list[list[str]]:
        """Return the name of each row's class, or those of the model's outputs."""
        return [self.labels.texts(label) for label in features["label"]]
