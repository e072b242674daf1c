"""The adapter protocol: what the library must know of one kind of model."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from typing_extensions import Self

from hf_forward_inf.adapters.agreement import parts_agree, rows_agree
from hf_forward_inf.adapters.naming import meant
from hf_forward_inf.utils.models import batch_size, evaluating, is_sharded, to_device, uncompiled

Rows: TypeAlias = dict[str, list[Any]]
"""A slice of a `datasets.Dataset`: column name to values."""
Batch: TypeAlias = dict[str, Any]
"""Padded tensors: the arguments of the model's forward, and whatever else the adapter's loss needs."""
Forward: TypeAlias = Callable[..., Any]
"""The model's forward: under its own parameters, or under perturbed ones (`ascent.parameters.call`)."""


class Adapter(ABC):
    """Teaches the library one kind of model.

    A subclass says which columns it reads, how rows become tensors and what the loss of one example is.
    Everything else (ascent, loss pass, caching, sharding) is written once, against these methods.

    Args:
        model (`torch.nn.Module`): The trained model, theta. Adapters never change it.
    """

    columns: tuple[str, ...]
    """The columns that queries and candidates must have."""
    skips_unreadable: bool = False
    """Whether rows that can't be read go without a score, or are refused."""
    contrast_columns: tuple[str, ...] = ()
    """Columns in which queries may hold what should have been said instead ([`contrast.Contrast`])."""
    max_draws: int | None = None
    """Draws of [`sampled_output_gradients`] that suffice for each prediction, where it is known."""
    answers_queries: bool = False
    """Whether queries without an answer are answered by the model when they are traced."""
    default_units: Literal["loss", "base_loss"] = "loss"
    """Units of scores that are best for this kind of model ([`ForwardInf`])."""
    default_falls: float = 1.0
    """Weight of a candidate's tokens whose losses fall that is best for this kind of model ([`ForwardInf`])."""
    poor_modes: ClassVar[Mapping[str, str]] = {}
    """Modes of the ascent ([`AscentConfig`]) that are worse for this kind of model, each with what it loses."""
    default_strategy: Literal["full", "screen"] = "full"
    """Strategy that `"auto"` prefers for this kind of model ([`ForwardInf`])."""
    shares: bool | None = None
    """Whether `run_shared` gives the same losses as the whole model; `None` until it was tried."""
    batches_rows: bool | None = None
    """Whether padding and other rows of a batch leave a row's loss alone; `None` until it was tried."""

    def __init__(self, model: nn.Module):
        self.model: Any = uncompiled(model)

    def columns_in(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return which of a dataset's columns are read."""
        return self.columns

    def meant(self, features: Mapping[str, Any]) -> dict[str, str]:
        """Return which columns of other names are meant by those that are missing: new names, by those there are.

        Args:
            features (`dict`): A dataset's features, by column.
        """
        return meant(self.columns, features)

    def only_asked(self, names: Iterable[str]) -> str | None:
        """Return the column of what queries without answers ask, where it has another name; `None` elsewhere."""
        return None

    def doubt(self, queries: Dataset, candidates: Dataset) -> str | None:
        """Return what users may not have meant by queries and candidates together, as a sentence."""
        return None

    def names_of(self, inputs: bool, targets: bool) -> tuple[str, str]:
        """Return the names of the columns of inputs and targets, where the user names one or both."""
        return self.columns[0], self.columns[-1]

    @property
    def config(self) -> dict[str, Any]:
        """How rows are read, as far as scores depend on it: part of an attribution's configuration."""
        return {}

    @property
    @abstractmethod
    def cache_key(self) -> str:
        """Everything but the weights that the losses depend on, as text: part of the cache key."""

    def prepare(self, rows: Dataset) -> Dataset:
        """Put columns into the form in which `encode` reads them, before any row is read."""
        return rows

    @abstractmethod
    def encode(self, rows: Rows) -> Rows:
        """Turn rows into features that Arrow can hold, one list entry a row.

        Besides the adapter's own features there are `terms` (`int`: the number of terms in the example's loss, 0 if
        there is nothing to predict) and `truncated` (`bool`: whether the row was longer than the model reads and
        lost its end; or `str`: what it lost, `"beginning"`, `"end"`, `"beginning and end"` or nothing); if rows may
        be corrupt, `unreadable` too (`str`: what can't be read and why, empty if the row can be read).
        """

    @abstractmethod
    def lengths(self, features: Rows | Dataset) -> np.ndarray:
        """Return the lengths that padding brings to a common size, `[rows, axes]`.

        Rows are sorted by them, the first axis first: put first the one whose padding costs most.
        """

    @abstractmethod
    def collate(self, features: Rows) -> Batch:
        """Pad features into one batch of CPU tensors."""

    @abstractmethod
    def term_losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Return the terms of each example's loss, float32 `[rows, terms]`, 0 where padded."""

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Return each example's loss, the sum of its terms, float32 `[rows]`."""
        return self.term_losses(forward, batch).sum(dim=1)

    def outputs(self, forward: Forward, batch: Batch) -> Tensor:
        """Return each example's prediction, `[rows, numbers]`; the norm of its change is the shift."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say how far a prediction moves: measure='shift' is for classifiers."
        )

    def outputs_and_loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Split the loss in two, for Gauss-Newton products: what the model predicts, and the loss of that.

        Returns:
            `tuple`: The outputs of all valid terms of the batch, and a function that gives the sum of their losses.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its model predicts.")

    def sampled_output_gradients(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss's gradient by the outputs, for targets drawn from the model's own predictions.

        Its mean is 0 and its covariance the H of the Gauss-Newton matrix, so that Kronecker factors estimate that
        matrix and not the scatter of the gradients at the true targets. Cross-entropy over logits, unless overridden.

        Args:
            outputs (`Tensor`): What `outputs_and_loss` returned, detached: logits, `[terms, classes]`.
            generator (`torch.Generator`): Draws the targets, on the CPU.

        Returns:
            `Tensor`: Of the outputs' shape.

        Raises:
            ValueError: If predictions are not finite.
        """
        return gradients_at_drawn_classes(outputs, generator)

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return how far each prediction has moved: KL(before, after) in nats, `[terms]`.

        Of logits, unless overridden.

        Args:
            before (`Tensor`): What [`outputs_and_loss`] returns first, `[terms, classes]`.
            after (`Tensor`): The same of a perturbed model.

        Raises:
            NotImplementedError: If the outputs are not logits of one class each, and an adapter does not say more.
        """
        if type(self).sampled_output_gradients is not Adapter.sampled_output_gradients:
            raise NotImplementedError(
                f"{type(self).__name__} does not say by how much predictions differ: give a radius, not trust."
            )
        return divergence_of_logits(before, after)

    def representation(self, batch: Batch) -> Tensor:
        """Return each example's hidden state, `[rows, features]`, for comparing examples by their representations."""
        raise NotImplementedError(f"{type(self).__name__} does not say which hidden states represent an example.")

    def loss_and_representation(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what [`loss`] and [`representation`] do, where possible by running the model once."""
        return self.loss(self.model, batch), self.representation(batch)

    def term_texts(self, features: Rows) -> list[list[str]]:
        """Return the text of every term of each example's loss, such as its token."""
        raise NotImplementedError(f"{type(self).__name__} does not say what the terms of its loss stand for.")

    def answer(self, rows: Rows) -> list[Any]:
        """Return the model's answers to rows without a target: one value for each, for the last of `columns`."""
        raise NotImplementedError(f"{type(self).__name__} does not generate: give queries a `{self.columns[-1]}`.")

    def with_outputs(self, rows: Rows, outputs: list[Any]) -> Rows:
        """Return the rows with other outputs, by default in the last of `columns`; `None` leaves a row's as it is."""
        column = self.columns[-1]
        pairs = zip(rows[column], outputs, strict=True)
        return {**rows, column: [own if other is None else other for own, other in pairs]}

    def rows_for(self, inputs: Any, candidates: Dataset | None = None) -> Rows:
        """Return what a user asks as rows without answers.

        Args:
            inputs: A text or a number, or a list of them.
            candidates (`datasets.Dataset`, *optional*): What they are traced over.
        """
        if not self.columns[:-1]:  # a model that draws without any input
            return {}
        values = [inputs] if isinstance(inputs, str | int) else list(inputs)
        return dict.fromkeys(self.columns[:-1], values)

    def with_answers(self, queries: Dataset, **options: Any) -> Dataset:
        """Return the queries with the model's answers where they have none, by [`answer`] with its options."""
        answer: Any = self.answer
        rows = queries[:]
        return Dataset.from_dict({**rows, self.columns[-1]: answer(rows, **options)})

    def for_queries(self, columns: Iterable[str]) -> "Adapter":
        """Return the adapter that reads queries with these columns: this one, unless they may be of another kind."""
        return self

    def for_encoded(self, features: Iterable[str]) -> "Adapter":
        """Return the adapter that encoded queries with these features."""
        return self

    def with_model(self, model: nn.Module) -> Self:
        """Return the same adapter for another model of the same architecture, such as a checkpoint."""
        other = copy.copy(self)
        other.model, other.shares, other.batches_rows = uncompiled(model), None, None
        other.__dict__.pop("_seen", None)  # what of the cache the other adapter has compared
        return other

    def default_modules(self) -> list[str]:
        """Return the names of the modules that are perturbed by default."""
        return ["all"]

    def default_ascent(self, direction: str | None = None) -> dict[str, Any]:
        """Return the options of [`AscentConfig`] used for this kind of model where the user sets none.

        Args:
            direction (`str`, *optional*): The direction that the user named. By default the preferred direction,
                which is then among the options returned.
        """
        return {}

    def shared_parameters(self) -> Set[str]:
        """Return the names of the parameters that `run_shared` reads: if none is perturbed, it need run only once."""
        return frozenset()

    def run_shared(self, batch: Batch) -> Batch:
        """Run what comes before the perturbed modules, and return the batch with its output in place."""
        return batch

    def with_shared(self, batch: Batch, names: Set[str]) -> Batch:
        """Run what comes before the perturbed modules once for all queries, where that is right.

        The first time, the first row is run both ways. A model whose losses differ (blocks that run several times,
        later blocks that read the keys of earlier ones) or that fails is run whole from then on.

        Args:
            batch (`dict`): On the model's device.
            names (`set[str]`): The parameters that are perturbed.

        Returns:
            `dict`: What [`run_shared`] returns, or the batch itself.
        """
        shared = self.shared_parameters()
        if not shared or shared & names or is_sharded(self.model):
            return batch
        if self.shares is None:
            first = self.first_row(batch)
            self.shares = parts_agree(
                self.model,
                whole=lambda: self.term_losses(self.model, first),
                parts=lambda: self.term_losses(self.model, self.run_shared(first)),
            )
        if not self.shares:
            return batch
        with torch.no_grad():
            return self.run_shared(batch)

    def shared_lengths(self, lengths: np.ndarray) -> np.ndarray | None:
        """Return how many positions [`shared_states`] has for each row; `None` if its states can't be stored by row.

        Args:
            lengths (`np.ndarray`): What [`lengths`] returns, `[rows, axes]`.
        """
        return None

    def shared_states(self, batch: Batch) -> Tensor:
        """Return what [`run_shared`] has put into the batch, `[rows, positions, features]`, padded on the right."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its shared part puts its output.")

    def with_states(self, batch: Batch, states: Tensor) -> Batch:
        """Return a batch with stored states in place, as [`run_shared`] returns it."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its shared part puts its output.")

    def first_row(self, batch: Batch) -> Batch:
        """Return the first row of a batch: what belongs to rows is as long as the first tensor."""
        rows = batch_size(batch)
        return {k: v[:1] if isinstance(v, Tensor) and len(v) == rows else v for k, v in batch.items()}

    def can_batch(self, features: Dataset, lengths: np.ndarray) -> bool:
        """Return whether rows of several lengths have the same losses together as each by itself.

        The first time, a few rows, the shortest and the longest, are run both ways. A model whose losses differ
        (attention that counts padding, experts with a limited capacity) is run on one row at a time.

        Args:
            features (`datasets.Dataset`): Encoded rows.
            lengths (`np.ndarray`): Their lengths, `[rows, axes]`.
        """
        if self.batches_rows is None and (lengths != lengths[0]).any():
            ends = [end for axis in lengths.T for end in (axis.argmin(), axis.argmax())]
            with evaluating(self.model):
                rows = [features[int(i)] for i in dict.fromkeys(ends)]
                self.batches_rows = rows_agree(self.model, self._losses_of, rows)
        return self.batches_rows is not False

    def _losses_of(self, rows: Sequence[dict[str, Any]]) -> Tensor:
        batch = self.collate({name: [row[name] for row in rows] for name in rows[0]})
        return self.loss(self.model, to_device(batch, self.model))


def divergence_of_logits(before: Tensor, after: Tensor) -> Tensor:
    """Return KL(before, after) of logits `[terms, classes]`, in nats, `[terms]`."""
    before, after = before.float().log_softmax(-1), after.float().log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1)


def gradients_at_drawn_classes(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradients of cross-entropies by logits `[terms, classes]`, for classes drawn from the predictions.

    Raises:
        ValueError: If predictions are not finite.
    """
    chances = logits.float().softmax(dim=-1)
    stairs = chances.cumsum(dim=-1)
    if not stairs[:, -1].isfinite().all():
        raise ValueError(
            "The model's predictions for training examples are NaN or infinite: load it in bfloat16 or float32, "
            "or check its weights."
        )
    # Random numbers of the CPU, so that a seed means the same targets on every device; one for each prediction.
    heights = torch.rand(len(chances), 1, generator=generator).to(chances.device) * stairs[:, -1:]
    drawn = torch.searchsorted(stairs, heights, right=True).clamp(max=chances.shape[1] - 1)
    return chances.scatter_add(1, drawn, -torch.ones_like(drawn, dtype=chances.dtype))
