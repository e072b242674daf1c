"""The kinds of labels of classifiers: how rows hold them, and the loss of each kind, as transformers defines it."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset
from torch import Tensor, nn

from hf_forward_inf.adapters.base import Batch, divergence_of_logits, gradients_at_drawn_classes
from hf_forward_inf.adapters.language import IGNORED
from hf_forward_inf.utils.validation import listed

GENERIC = re.compile(r"LABEL_\d+")
"""Names that transformers gives classes whose names it does not know."""
NAMES = "Dataset.class_encode_column makes integers of names."


@dataclass(frozen=True)
class OneClass:
    """One class a row: its number from 0, or its name. The loss is the cross-entropy, or minus the margin.

    Args:
        count (`int`, defaults to 0): Number of classes; 0 if the model does not state it.
        names (`dict[str, int]`, defaults to none): The model's classes by name.
        margin (`bool`, defaults to `False`): Whether the loss is -log(p / (1 - p)) instead of -log(p).
    """

    count: int = 0
    names: Mapping[str, int] = field(default_factory=dict)
    margin: bool = False
    blank = 0
    """Stands for a label that is missing."""

    def read(self, values: Sequence[Any], feature: Any, column: str) -> list[int | None]:
        """Return the classes of a column as the model numbers them.

        Raises:
            ValueError: If a label is no class. It names the rows.
        """
        find = _finder(self.names, feature)
        found = [None if value is None else find(value) for value in values]
        lost = [value is not None and (one is None or one < 0) for value, one in zip(values, found, strict=True)]
        known = f", or one of the model's classes {_some(self.names)}" if self.names else ""
        _refuse(values, lost, column, f"; a label is an integer from 0{known}. {NAMES}")
        beyond = [one is not None and 0 < self.count <= one for one in found]
        more = "Give a model with more classes, or drop the rows."
        _refuse(found, beyond, column, f", but the model knows only the classes 0 to {self.count - 1}. {more}")
        return found

    def read_lists(self, values: Sequence[Any], feature: Any, column: str) -> list[list[int] | None]:
        """Return the classes of a column of lists; as [`read`], but that -100 stays: it is no label."""
        find = _finder(self.names, getattr(feature, "feature", None))
        found = [value and [one if one == IGNORED else find(one) for one in value] for value in values]
        wrong = [
            value is not None and any(one is None or not (one == IGNORED or 0 <= one < self.count) for one in value)
            for value in found
        ]
        known = f", or their names: {_some(self.names)}" if self.names else ""
        _refuse(values, wrong, column, f"; labels are lists of integers from 0 to {self.count - 1}{known}.")
        return found

    def terms(self, label: Any) -> int:
        """Return the number of terms of a row's loss."""
        return int(label is not None)

    def collate(self, labels: list[int]) -> Batch:
        """Return the labels as a tensor `[rows]`, and the highest of them."""
        return {"label": torch.tensor(labels), "highest": max(labels)}

    def check(self, logits: Tensor, batch: Batch, model: str, column: str) -> None:
        """Refuse outputs that are no logits of these labels: raise a `ValueError`."""
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(
                f"{model} returns a tensor of shape {tuple(logits.shape)} for {len(batch['label'])} rows; logits have "
                "the shape [rows, classes], of 2 classes or more."
            )
        if batch["highest"] >= logits.shape[1]:
            raise ValueError(
                f"Column `{column}` holds {batch['highest']}, but the model knows only the classes 0 to "
                f"{logits.shape[1] - 1}."
            )

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of each row's label, or minus its margin, float64 `[rows, 1]`."""
        margins = margins_of(logits, labels)
        return (-margins if self.margin else cross_entropies(margins))[:, None]

    def summed(self, labels: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the function from logits to their summed cross-entropy."""
        return lambda outputs: F.cross_entropy(outputs, labels, reduction="sum")

    def sampled(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return the gradient of the cross-entropy by the outputs, for classes drawn from the predictions."""
        return gradients_at_drawn_classes(outputs, generator)

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the KL divergence of the predicted classes, `[rows]`."""
        return divergence_of_logits(before, after)

    def predicted(self, logits: Tensor) -> list[Any]:
        """Return the most probable class of each row."""
        return logits.argmax(dim=1).tolist()

    def texts(self, label: int) -> list[str]:
        """Return the names of the terms of a row's loss: that of its class."""
        return [next((name for name, number in self.names.items() if number == label), str(label))]


@dataclass(frozen=True)
class _PerOutput:
    """What labels with one number for each of the model's outputs share: the loss is a mean over them."""

    count: int
    names: Mapping[str, int] = field(default_factory=dict)

    @property
    def blank(self) -> list[float]:
        """Stands for a label that is missing."""
        return [0.0] * self.count

    def terms(self, label: Any) -> int:
        """Return the number of terms of a row's loss."""
        return 0 if label is None else self.count

    def collate(self, labels: list[list[float]]) -> Batch:
        """Return the labels as a tensor `[rows, outputs]`."""
        return {"label": torch.tensor(labels, dtype=torch.float32)}

    def check(self, logits: Tensor, batch: Batch, model: str, column: str) -> None:
        """Refuse outputs that are no predictions of these labels: raise a `ValueError`."""
        if logits.shape != batch["label"].shape:
            raise ValueError(
                f"{model} returns a tensor of shape {tuple(logits.shape)}, and column `{column}` holds "
                f"{self.count} numbers for each of {len(batch['label'])} rows."
            )

    def texts(self, label: Any) -> list[str]:
        """Return the names of the terms of a row's loss: those of the outputs."""
        named = {number: name for name, number in self.names.items()}
        return [named.get(i, str(i)) for i in range(self.count)]


@dataclass(frozen=True)
class SeveralClasses(_PerOutput):
    """Any number of classes a row (`problem_type="multi_label_classification"`): binary cross-entropy of each.

    A row holds a 0 or 1 for each class of the model, or the names of its classes, or, in a `List(ClassLabel)`, their
    numbers.
    """

    def read(self, values: Sequence[Any], feature: Any, column: str) -> list[list[float] | None]:
        """Return a 0 or 1 for each of the model's classes; as [`OneClass.read`]."""
        inner = getattr(feature, "feature", None)
        find = _finder(self.names, inner)
        found = [None if value is None else self._marked(value, inner, find) for value in values]
        rule = f"a list of {self.count} zeros and ones, or of names of classes, or a List(ClassLabel)"
        lost = [value is not None and one is None for value, one in zip(values, found, strict=True)]
        _refuse(values, lost, column, f"; a label of a model for several classes a row is {rule}.")
        return found

    def _marked(self, value: Any, inner: Any, find: Callable[[Any], int | None]) -> list[float] | None:
        if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
            return None
        if isinstance(inner, ClassLabel) or (len(value) and all(isinstance(one, str) for one in value)):
            classes = [find(one) for one in value]
            if any(one is None or not 0 <= one < self.count for one in classes):
                return None
            return [float(i in classes) for i in range(self.count)]
        shares = all(isinstance(one, Real) and 0 <= float(one) <= 1 for one in value)
        return [float(one) for one in value] if shares and len(value) == self.count else None

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the binary cross-entropy of each class, divided by their number, `[rows, classes]`."""
        logits = precise(logits)
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none") / self.count

    def summed(self, labels: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the function from logits to their summed loss."""
        return lambda outputs: (
            F.binary_cross_entropy_with_logits(outputs, labels.to(outputs.dtype), reduction="sum") / self.count
        )

    def sampled(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return the gradient of the loss by the outputs, for classes drawn from the predictions.

        Scaled by the root of the number of classes, as the loss is divided by it: the covariance is the Hessian.
        """
        chances = outputs.float().sigmoid()
        drawn = torch.bernoulli(chances.cpu(), generator=generator).to(outputs.device)
        return (chances - drawn) / self.count**0.5

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the mean KL divergence of the classes, each of which applies or not, `[rows]`."""
        pairs = (torch.stack([logits.float(), torch.zeros_like(logits)], dim=-1) for logits in (before, after))
        return divergence_of_logits(*pairs).mean(1)

    def predicted(self, logits: Tensor) -> list[Any]:
        """Return a 0 or 1 for each class of each row."""
        return (logits > 0).float().tolist()


@dataclass(frozen=True)
class Numbers(_PerOutput):
    """A number for each of the model's outputs (`problem_type="regression"`): the squared error.

    A row holds a number, or a list of as many as the model has outputs.
    """

    def read(self, values: Sequence[Any], feature: Any, column: str) -> list[list[float] | None]:
        """Return the numbers; as [`OneClass.read`]."""
        found = [None if value is None else self._numbers(value) for value in values]
        lost = [value is not None and one is None for value, one in zip(values, found, strict=True)]
        rule = "one number" if self.count == 1 else f"{self.count} numbers"
        _refuse(values, lost, column, f", but the model predicts {rule} a row.")
        return found

    def _numbers(self, value: Any) -> list[float] | None:
        numbers = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
        real = all(isinstance(one, Real) and not isinstance(one, bool) and np.isfinite(float(one)) for one in numbers)
        return [float(one) for one in numbers] if real and len(numbers) == self.count else None

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the squared error of each output, divided by their number, `[rows, outputs]`."""
        return (logits.float() - labels).square() / self.count

    def summed(self, labels: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the function from outputs to their summed loss."""
        return lambda outputs: (outputs - labels).square().sum() / self.count

    def sampled(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return the gradient of the loss by the outputs, for targets drawn around them."""
        return torch.randn(outputs.shape, generator=generator).to(outputs.device) * (2 / self.count) ** 0.5

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the mean squared difference, the KL divergence if losses are negative log-likelihoods, `[rows]`."""
        return (before - after).float().square().mean(1)

    def predicted(self, logits: Tensor) -> list[Any]:
        """Return the outputs: a number a row, or a list of them."""
        return logits[:, 0].tolist() if self.count == 1 else logits.tolist()


LabelKind: TypeAlias = OneClass | SeveralClasses | Numbers


def label_kind(model: nn.Module, margin: bool = False) -> LabelKind:
    """Return the kind of labels that a model was trained on, according to its configuration.

    That is `problem_type`; where it is not stated, one output means a number, and several mean one class a row.

    Raises:
        ValueError: If margins are asked of other labels than one class a row.
    """
    config: Any = getattr(model, "config", None)
    count = getattr(config, "num_labels", 0)
    problem = getattr(config, "problem_type", None) or ("regression" if count == 1 else "single_label_classification")
    names = class_names(config)
    if problem == "single_label_classification":
        return OneClass(count, names, margin)
    if margin:
        raise ValueError(f"objective='margin' is for one class a row, and the model's problem_type is {problem}.")
    return (SeveralClasses if problem == "multi_label_classification" else Numbers)(count, names)


def class_names(config: Any) -> dict[str, int]:
    """Return the numbers of a model's classes by their names; nothing where the names say no more than the number."""
    names = {str(name): int(number) for number, name in (getattr(config, "id2label", None) or {}).items()}
    return {} if all(GENERIC.fullmatch(name) for name in names) else names


def replaced(rows: Dataset, column: str, values: list[Any]) -> Dataset:
    """Return rows with other values in a column; the same rows where nothing differs."""
    return (
        rows if rows.with_format(None)[column][:] == values else rows.remove_columns(column).add_column(column, values)
    )


def only(known: tuple[str, ...], names: list[str], role: str) -> str:
    """Return the one of the known columns that is there, the first if none is.

    Raises:
        ValueError: If several are.
    """
    found = [name for name in known if name in names]
    if len(found) > 1:
        raise ValueError(f"The rows have several columns for the {role}: {', '.join(found)}. Keep one of them.")
    return found[0] if found else known[0]


def precise(logits: Tensor) -> Tensor:
    """Return logits in float64, in float32 where a device has no better."""
    return logits.float() if logits.device.type == "mps" else logits.double()


def margins_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log(p / (1 - p)), p the probability of a row's label."""
    logits, own = precise(logits), labels[:, None]
    return logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).logsumexp(dim=1)


def cross_entropies(margins: Tensor) -> Tensor:
    """Return the cross-entropy -log p of margins, `[rows]`.

    As softplus(-margin) it distinguishes losses down to 1e-308, with their gradients; log_softmax returns 0 as soon as
    float32 rounds p to 1, as it does for examples that the model has memorised.
    """
    return F.softplus(-margins)


def _finder(names: Mapping[str, int], feature: Any) -> Callable[[Any], int | None]:
    """Return what finds the number that the model gives a label, `None` for what is no label.

    Numbers of a `ClassLabel` whose names are the model's mean what they are called, whatever their order. Names are
    compared without regard to case where that is unambiguous.
    """
    folded = {name.casefold(): number for name, number in names.items()}
    known = folded if len(folded) == len(names) else names
    key = str.casefold if known is folded else str
    own = [known.get(key(name)) for name in feature.names] if isinstance(feature, ClassLabel) and names else []
    if own and all(number is None for number in own):
        warnings.warn(
            f"The dataset's classes {_some(feature.names)} are none of the model's, {_some(names)}: they are matched "
            "by number. Rename the ones or the others if their order differs.",
            stacklevel=2,
        )
        own = []

    def find(value: Any) -> int | None:
        if isinstance(value, str):
            return known.get(key(value))
        if not isinstance(value, Integral) or isinstance(value, bool):
            return None
        number = int(value)
        return own[number] if own and 0 <= number < len(own) else number

    return find


def _some(names: Any) -> str:
    shown = [repr(name) for name in list(names)[:5]]
    return ", ".join(shown) + (", ..." if len(names) > 5 else "")


def _refuse(values: Sequence[Any], wrong: list[bool], column: str, rule: str) -> None:
    rows = np.flatnonzero(wrong)
    if len(rows):
        raise ValueError(f"Column `{column}` holds {str(values[rows[0]])[:60]} in {listed(rows)}{rule}")
