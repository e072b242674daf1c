"""Tasks that train in seconds, so that they can be trained again without some of their data."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from torch import Tensor, nn

from hf_forward_inf.adapters import Adapter, TensorAdapter
from hf_forward_inf.data.digits import labelled_digits
from hf_forward_inf.scores.batched_training import BatchedTraining, losses_and_answers_of, losses_of
from hf_forward_inf.scores.retraining import Train, retrained_outcomes
from hf_forward_inf.utils.fingerprints import fingerprint


@dataclass(frozen=True)
class Retrainable:
    """Data, its training, and queries to explain.

    Args:
        key (`str`): Cache key of data, network and training.
        candidates (`datasets.Dataset`): Training data.
        queries (`datasets.Dataset`): Queries of the evaluation: half with the highest losses, half random.
        others (`datasets.Dataset`): As many other queries, to choose settings by.
        adapter (`Callable`): Returns the adapter of a model trained on all candidates, given a seed.
        train (`Callable`): Given queries, returns a [`retraining.Train`] whose outcomes are the loss of each query and
            whether its target is the model's answer (1 or 0), `[models, queries, 2]`.
        columns (`tuple[str, str]`): Columns of inputs and targets.
        together (`int`, defaults to 40): Models trained in a batch.
    """

    key: str
    candidates: Dataset
    queries: Dataset
    others: Dataset
    adapter: Callable[[int], Adapter]
    train: Callable[[Dataset], Train]
    columns: tuple[str, str]
    together: int = 40

    def retrained(self, queries: Dataset, subsets: np.ndarray, seeds: int) -> np.ndarray:
        """Train on every subset with every seed, or read cached outcomes; return them, `[seeds, subsets, queries, 2]`.

        Args:
            queries (`datasets.Dataset`): Queries to evaluate.
            subsets (`np.ndarray`): Booleans `[subsets, candidates]`.
            seeds (`int`): Trainings of each subset.
        """
        key = fingerprint(self.key, [queries[column][:] for column in self.columns])
        return retrained_outcomes(self.train(queries), subsets, key=key, seeds=seeds, together=self.together)


def perceptron() -> nn.Module:
    """Return a network of two linear layers, 64-24-10: 1,810 parameters."""
    return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))


def conv() -> nn.Module:
    """Return a network of two convolutions and a linear layer: 1,898 parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


STEPS = 400
"""Training steps over all of the data; with a thousand, results were no clearer."""
NETWORKS = {"perceptron": perceptron, "conv": conv}


def digits(
    network: str = "perceptron", candidates: int = 800, queries: int = 40, steps: int | None = None
) -> Retrainable:
    """Return the task of scikit-learn's handwritten digits (8 x 8 pixels) and a small network.

    Args:
        network (`str`, defaults to `"perceptron"`): `"perceptron"` or `"conv"`.
        candidates (`int`, defaults to 800): Training examples; queries are chosen among the rest of 1,797.
        queries (`int`, defaults to 40): Number of queries, and of other queries.
        steps (`int`, *optional*): Training steps, each over all of the data. Defaults to 400.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If there are not enough digits.
    """
    rows = small_digits()
    if not 0 < candidates <= len(rows) - 2 * queries:
        raise ValueError(f"{candidates} candidates and twice {queries} queries don't fit into {len(rows)} digits.")
    data, rest = rows.select(range(candidates)), rows.select(range(candidates, len(rows)))

    def train(asked: Dataset) -> BatchedTraining:
        return BatchedTraining(
            NETWORKS[network], _tensors(data), _tensors(asked), steps=steps or STEPS, outcomes=losses_and_answers_of
        )

    def adapter(seed: int) -> Adapter:
        return TensorAdapter(train(rest).model(seed))

    losses = losses_of(adapter(0).model, *_tensors(rest))({}).detach().numpy()
    judged, others = hard_and_random(losses, queries)
    key = fingerprint("digits, losses and answers", network, candidates, repr(train(rest).settings))
    return Retrainable(key, data, rest.select(judged), rest.select(others), adapter, train, ("x", "label"))


def hard_and_random(losses: np.ndarray, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Choose two sets of `count` queries, half of each with the highest losses, half random.

    Returns:
        `tuple`: Row numbers of the first set, which has the highest losses, and of the second.
    """
    half = count // 2
    order = np.argsort(-losses, kind="stable")
    rest = np.random.default_rng(seed).permutation(np.sort(order[2 * half :]))
    cut = count - half
    return (
        np.concatenate([order[:half], rest[:cut]]),
        np.concatenate([order[half : 2 * half], rest[cut : 2 * cut]]),
    )


def small_digits() -> Dataset:
    """Return scikit-learn's digits in random order: `x`, 64 numbers from 0 to 1, `label`, and `image`."""
    rows = labelled_digits()
    images, labels = rows["image"][:], np.array(rows["label"][:])
    x = np.stack([np.round(np.asarray(image, dtype=np.float64).ravel() * 16 / 255) / 16 for image in images])
    order = np.random.default_rng(0).permutation(len(rows))
    columns = {"x": x[order].tolist(), "label": labels[order].tolist(), "image": [images[i] for i in order]}
    features = Features({"x": List(Value("float64")), "label": Value("int64"), "image": Image()})
    return Dataset.from_dict(columns, features=features)


def _tensors(rows: Dataset) -> tuple[Tensor, Tensor]:
    return torch.tensor(rows["x"][:]), torch.tensor(rows["label"][:])
