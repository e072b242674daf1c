"""What quanda's metrics need: networks whose training data has groups, wrong labels, a shortcut or strange images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from quanda.explainers import Explainer
from quanda.metrics.base import Metric
from quanda.metrics.downstream_eval import (
    ClassDetectionMetric,
    MislabelingDetectionMetric,
    ShortcutDetectionMetric,
    SubclassDetectionMetric,
)
from quanda.metrics.ground_truth import LinearDatamodelingMetric
from quanda.metrics.heuristics import MixedDatasetsMetric, TopKCardinalityMetric
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

from experiments.retrainable import NETWORKS, small_digits
from hf_forward_inf.adapters import Adapter
from hf_forward_inf.scores.batched_training import BatchedTraining, Outcomes
from hf_forward_inf.scores.retraining import random_subsets, retrained_outcomes
from hf_forward_inf.toys.classifiers import load_classifier
from hf_forward_inf.utils.fingerprints import fingerprint

Pairs = tuple[Tensor, Tensor]
"""Inputs `[rows, ...]` and labels `[rows]`."""
BEST = 5
"""Candidates of each query whose classes count, and that are counted as distinct."""
GROUP = 2
"""Digits in a group of the labels that a network learns, where its subclasses are to be found."""
GLARING = 4.0
"""Brightness of the mark of a shortcut, where white is 1: of a white one, networks learn nothing."""
WRONG, MARKED, STRANGE = 0.2, 0.5, 0.05
"""Shares: of labels drawn at random, of zeros that are marked, of negatives among the training data."""


@dataclass(frozen=True)
class Problem:
    """A trained network, its data, and what quanda's metrics say of an explainer.

    Args:
        model (`torch.nn.Module`): The network.
        train (`TensorDataset`): What it was trained on.
        queries (`torch.Tensor`): Inputs whose predicted classes are explained.
        judge (`Callable`): Given an explainer, and its explanations of the queries, returns figures by metric.
        explained (`bool`, defaults to `True`): Whether explanations are needed; else self-influence alone.
    """

    model: nn.Module
    train: TensorDataset
    queries: Tensor
    judge: Callable[[Explainer, Tensor], dict[str, float]]
    explained: bool = True

    @property
    def predicted(self) -> Tensor:
        """The classes that the network predicts."""
        with torch.no_grad():
            return self.model(self.queries).argmax(dim=1)

    def figures(self, explainer: Explainer) -> dict[str, float]:
        """Return an explainer's figures by metric."""
        found = explainer.explain(self.queries, self.predicted) if self.explained else torch.empty(0)
        return self.judge(explainer, found)


def score(metric: Metric, *args: object, **options: object) -> float:
    """Update a metric once, and return its score."""
    metric.update(*args, **options)
    return float(metric.compute()["score"])


@dataclass(frozen=True)
class Digits:
    """Networks of handwritten digits.

    Args:
        network (`str`, defaults to `"perceptron"`): Name in [`NETWORKS`].
        candidates (`int`, defaults to 800): Training images.
        queries (`int`, defaults to 50): Queries.
        halves (`int`, defaults to 40): Random halves that are trained on for the LDS.
        seed (`int`, defaults to 0): Seed of the network, and of what is drawn.
    """

    network: str = "perceptron"
    candidates: int = 800
    queries: int = 50
    halves: int = 40
    seed: int = 0

    def problems(self) -> Iterator[Problem]:
        """Train one network after another, and yield them."""
        yield from (self.plain(), self.grouped(), self.mislabelled(), self.with_shortcut(), self.mixed())

    def plain(self) -> Problem:
        """Digits as they are: are the best of the predicted class, and others for each query? And retraining."""
        train, (queries, _) = self._data()
        training = self._training(train, queries)
        subsets = random_subsets(self.candidates, self.halves, seed=self.seed)
        key = fingerprint("quanda, logits", repr(self), repr(training.settings))
        logits = torch.from_numpy(retrained_outcomes(training, subsets, key=key)[0])
        model, data = training.model(self.seed), TensorDataset(*train)
        halves = [np.flatnonzero(subset).tolist() for subset in subsets]

        def judge(_: Explainer, found: Tensor) -> dict[str, float]:
            lds = LinearDatamodelingMetric(
                model, data, m=len(halves), subset_ids=halves, subset_ckpt_filenames=[""] * len(halves)
            )
            known = dict(enumerate(logits))
            return {
                "class_detection": score(ClassDetectionMetric(model, data, s=BEST), found, problem.predicted),
                "cardinality": score(TopKCardinalityMetric(model, data, top_k=BEST), found),
                "lds": score(lds, found, problem.predicted, queries, subset_logits=known),
            }

        problem = Problem(model, data, queries, judge)
        return problem

    def grouped(self) -> Problem:
        """Learn pairs of digits: are the best of the same digit?"""
        (x, digits), (queries, own) = self._data()
        model = self._training((x, digits // GROUP), queries).model(self.seed)
        data = TensorDataset(x, digits // GROUP)

        def judge(_: Explainer, found: Tensor) -> dict[str, float]:
            return {"subclass_detection": score(SubclassDetectionMetric(model, data, digits, s=BEST), found, own)}

        return Problem(model, data, queries, judge)

    def mislabelled(self) -> Problem:
        """A fifth of the labels are drawn at random: does self-influence find those that are wrong?"""
        (x, digits), (queries, _) = self._data()
        draw = np.random.default_rng(self.seed)
        labels = np.where(draw.random(len(x)) < WRONG, draw.integers(10, size=len(x)), digits.numpy())
        wrong = np.flatnonzero(labels != digits.numpy()).tolist()
        train = (x, torch.from_numpy(labels))
        model, data = self._training(train, queries).model(self.seed), TensorDataset(*train)

        def judge(explainer: Explainer, _: Tensor) -> dict[str, float]:
            # Ranks: quanda adds 1e-4 times the row number before it sorts, which would outweigh small scores.
            ranks = explainer.self_influence().argsort().argsort().float()
            found = MislabelingDetectionMetric(model, data, wrong, precomputed_self_influence=ranks).compute()
            return {"mislabelling": float(found["score"])}

        return Problem(model, data, queries, judge, explained=False)

    def with_shortcut(self) -> Problem:
        """Half of the zeros have a mark: are they found for other digits that the mark turns into zeros?"""
        (x, digits), (queries, own) = self._data()
        draw = torch.Generator().manual_seed(self.seed)
        has_mark = (digits == 0) & (torch.rand(len(x), generator=draw) < MARKED)
        train = (torch.where(has_mark[:, None], marked(x), x), digits)
        queries, own = marked(queries)[own != 0], own[own != 0]
        model, data = self._training(train, queries).model(self.seed), TensorDataset(*train)

        def judge(_: Explainer, found: Tensor) -> dict[str, float]:
            metric = ShortcutDetectionMetric(model, data, has_mark.nonzero().flatten().tolist(), 0)
            return {"shortcut": score(metric, found, queries, own)}

        return Problem(model, data, queries, judge)

    def mixed(self) -> Problem:
        """Negatives are called zeros: are they found for other negatives?"""
        (x, digits), (queries, _) = self._data()
        strange = torch.arange(len(x)) < round(STRANGE * len(x))
        train = (torch.where(strange[:, None], 1 - x, x), torch.where(strange, 0, digits))
        model, data = self._training(train, queries).model(self.seed), TensorDataset(*train)

        def judge(_: Explainer, found: Tensor) -> dict[str, float]:
            return {"mixed_datasets": score(MixedDatasetsMetric(model, data, strange.int()), found)}

        return Problem(model, data, 1 - queries, judge)

    def _data(self) -> tuple[Pairs, Pairs]:
        rows = small_digits().shuffle(seed=self.seed).select(range(self.candidates + self.queries))
        x, labels = torch.tensor(rows["x"][:]), torch.tensor(rows["label"][:])
        return (x[: self.candidates], labels[: self.candidates]), (x[self.candidates :], labels[self.candidates :])

    def _training(self, train: Pairs, queries: Tensor) -> BatchedTraining:
        asked = (queries, torch.zeros(len(queries), dtype=torch.long))
        return BatchedTraining(NETWORKS[self.network], train, asked, outcomes=logits_of)


def logits_of(network: nn.Module, inputs: Tensor, labels: Tensor) -> Outcomes:
    """Return a function from parameters to the logits of some rows, `[rows, classes]`."""
    return lambda parameters: functional_call(network, parameters, (inputs,))


def marked(images: Tensor) -> Tensor:
    """Return images `[rows, 64]` with a glaring square of 3 x 3 pixels in the first corner."""
    found = images.clone().unflatten(1, (8, 8))
    found[:, :3, :3] = GLARING
    return found.flatten(1)


def loaded(source: str, candidates: Dataset, queries: Dataset) -> Problem:
    """Return the problem of a trained classifier: are the best of the predicted class, and others for each query?"""
    adapter = load_classifier(source)
    data, (asked, _) = TensorDataset(*_tensors_of(adapter, candidates)), _tensors_of(adapter, queries)

    def judge(_: Explainer, found: Tensor) -> dict[str, float]:
        return {
            "class_detection": score(ClassDetectionMetric(adapter.model, data, s=BEST), found, problem.predicted),
            "cardinality": score(TopKCardinalityMetric(adapter.model, data, top_k=BEST), found),
        }

    problem = Problem(adapter.model, data, asked, judge)
    return problem


def _tensors_of(adapter: Adapter, rows: Dataset) -> Pairs:
    batch = adapter.collate(adapter.encode(adapter.prepare(rows)[:]))
    return batch["input"], batch["label"]
