"""The hypothesis for noisy training: groups with rising shares of wrong labels, and clean queries (section 2.1)."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from experiments.point_to_point import Influences
from hf_forward_inf.adapters import TensorAdapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.ascent.parameters import call
from hf_forward_inf.ascent.steps import ascend
from hf_forward_inf.curvature.perturber import Perturber
from hf_forward_inf.scores.batched_training import BatchedTraining
from hf_forward_inf.scores.retraining import retrained_outcomes
from hf_forward_inf.utils.fingerprints import fingerprint


def mislabelled(
    labels: np.ndarray, groups: int, classes: int, seed: int = 0, *, ratio: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Split examples into groups of equal size, and give wrong labels to a rising share of each.

    Args:
        labels (`np.ndarray`): Integers from 0, `[examples]`; those that don't fill a group are skipped.
        groups (`int`): Number of groups, at least 2.
        classes (`int`): Number of classes; wrong labels are drawn from all but the right one.
        seed (`int`, defaults to 0): Seed of the examples and their wrong labels.
        ratio (`float`, defaults to 0.5): Share of wrong labels among all: none in the first group, twice as many in
            the last.

    Returns:
        `tuple`: Each example's group, and its label.
    """
    size = len(labels) // groups
    of, noisy = np.repeat(np.arange(groups), size), labels[: groups * size].copy()
    draw = np.random.default_rng(seed)
    for group in range(groups):
        wrong = draw.permutation(np.flatnonzero(of == group))[: round(2 * ratio * size * group / (groups - 1))]
        noisy[wrong] = (noisy[wrong] + draw.integers(1, classes, len(wrong))) % classes
    return of, noisy


@dataclass(frozen=True)
class GroupTask:
    """Examples in groups, and queries that are explained together.

    Args:
        training (`BatchedTraining`): A training whose data are the examples, followed by the queries.
        of (`np.ndarray`): Each example's group, `[examples]`.
        queries (`int`, *optional*): Number of queries to use, the first ones. Defaults to all.
    """

    training: BatchedTraining
    of: np.ndarray
    queries: int | None = None

    @property
    def rows(self) -> slice:
        """Return the rows of the data that are queries."""
        return slice(len(self.of), len(self.training.data[0]) if self.queries is None else len(self.of) + self.queries)

    def by_group(self, losses: np.ndarray) -> np.ndarray:
        """Return mean losses of the groups, `[..., groups]`, from losses `[..., rows]`."""
        return np.stack([losses[..., : len(self.of)][..., self.of == g].mean(-1) for g in np.unique(self.of)], -1)

    def influences(self, seeds: int) -> Influences:
        """Train without each group, and with the queries added; return influences, `[seeds, groups]` each."""
        count, groups, asked = len(self.of), len(np.unique(self.of)), self.rows
        everyone = np.arange(len(self.training.data[0]))[None]
        base, added = everyone < count, everyone < asked.stop
        without = np.repeat(base, groups, axis=0)
        for group in range(groups):
            without[group, :count] &= self.of != group
        key = fingerprint(repr(self.training.settings), *(part.numpy().tobytes() for part in self.training.data))
        losses = partial(retrained_outcomes, self.training, key=key, seeds=seeds)
        before = losses(base)[:, 0]
        to_query = losses(without)[..., asked].mean(-1) - before[:, asked].mean(-1)[:, None]
        return Influences(to_query, self.by_group(before) - self.by_group(losses(added)[:, 0]))

    def model(self, seed: int) -> nn.Module:
        """Return a model trained on the examples alone."""
        return self.training.model(seed, np.arange(len(self.training.data[0])) < len(self.of))

    def forward_inf(self, model: nn.Module, ascent: AscentConfig) -> np.ndarray:
        """Return how much each group's loss rises after ascent on the mean loss of all queries, `[groups]`."""
        inputs, labels = self.training.data
        count = len(self.of)
        adapter = TensorAdapter(model)
        ascent = replace(ascent, modules=["all"]).completed(adapter.default_ascent)
        examples = _rows(inputs[:count], labels[:count])
        perturber = Perturber(adapter, ascent, examples)
        queries = adapter.encode(_rows(inputs[self.rows], labels[self.rows])[:])
        correct = None if perturber.direction is None else perturber.direction.correction()
        theta = ascend(adapter, queries, perturber.names, ascent, correct)
        if theta is None:
            raise ValueError("The gradient of the queries is zero or not finite: choose other queries.")
        batch = adapter.collate(adapter.encode(examples[:]))
        with torch.no_grad():
            risen = adapter.loss(partial(call, model, theta), batch) - adapter.loss(model, batch)
        return self.by_group(risen.numpy())


def _rows(inputs: Tensor, labels: Tensor) -> Dataset:
    return Dataset.from_dict({"x": inputs.numpy().tolist(), "label": labels.tolist()})
