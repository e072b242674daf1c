"""Tasks that train in a moment, so that they can be trained again without some of their data."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_forward_inf.adapters import Adapter, TensorAdapter
from hf_forward_inf.fingerprints import fingerprint
from hf_forward_inf.retraining import BatchedTraining, Train, losses_of


@dataclass(frozen=True)
class Retrainable:
    """Data, a way to train on it, and outputs to explain.

    Args:
        key (`str`): Names data, network and training: what was retrained under one key stays true.
        candidates (`datasets.Dataset`): The training data.
        queries (`datasets.Dataset`): What attributors are judged by: half of them of the highest loss, half at random.
        others (`datasets.Dataset`): As many other queries, the next in line, by which settings can be chosen.
        adapter (`Callable`): Given a seed, the adapter of a model trained on all candidates.
        train (`Callable`): Given queries, what trains on subsets and tells their losses ([`retraining.Train`]).
        classes (`int`, *optional*): How many answers there are, where a column `label` holds them.
        together (`int`, defaults to 40): Models trained at once.
    """

    key: str
    candidates: Dataset
    queries: Dataset
    others: Dataset
    adapter: Callable[[int], Adapter]
    train: Callable[[Dataset], Train]
    classes: int | None = None
    together: int = 40


def perceptron() -> nn.Module:
    """64-24-10: 1,810 parameters."""
    return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))


def conv() -> nn.Module:
    """Two convolutions and a linear layer: 1,898 parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


STEPS = 400
"""Steps of training over all of the data; a thousand gave no clearer picture."""
NETWORKS = {"perceptron": perceptron, "conv": conv}


def digits(
    network: str = "perceptron", candidates: int = 800, queries: int = 40, steps: int | None = None
) -> Retrainable:
    """Handwritten digits (scikit-learn's, 8 x 8 pixels) and a small network.

    Args:
        network (`str`, defaults to `"perceptron"`): `"perceptron"` or `"conv"`.
        candidates (`int`, defaults to 800): Training examples; queries are chosen among the rest of 1,797.
        queries (`int`, defaults to 40): Queries.
        steps (`int`, *optional*): Steps of training, each over all of the data. Defaults to 400.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If there are not enough digits.
    """
    rows = _digits()
    if not 0 < candidates <= len(rows) - 2 * queries:
        raise ValueError(f"{candidates} candidates and twice {queries} queries don't fit into {len(rows)} digits.")
    data, rest = rows.select(range(candidates)), rows.select(range(candidates, len(rows)))

    def train(asked: Dataset) -> BatchedTraining:
        return BatchedTraining(NETWORKS[network], _tensors(data), _tensors(asked), steps=steps or STEPS)

    def adapter(seed: int) -> Adapter:
        return TensorAdapter(train(rest).model(seed))

    losses = losses_of(adapter(0).model, *_tensors(rest))({}).detach().numpy()
    judged, others = hard_and_random(losses, queries)
    key = fingerprint("digits", network, candidates, repr(train(rest).settings))
    return Retrainable(key, data, rest.select(judged), rest.select(others), adapter, train, classes=10)


def hard_and_random(losses: np.ndarray, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Choose twice `count` queries: half of each share of the highest losses, half at random from the others.

    Returns:
        `tuple`: Row numbers of the first share, which gets the highest, and of the second.
    """
    half = count // 2
    order = np.argsort(-losses, kind="stable")
    rest = np.random.default_rng(seed).permutation(np.sort(order[2 * half :]))
    cut = count - half
    return (
        np.concatenate([order[:half], rest[:cut]]),
        np.concatenate([order[half : 2 * half], rest[cut : 2 * cut]]),
    )


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The digits come with scikit-learn: pip install 'hf-forward-inf[truth]'.") from error
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = (pixels[order] / 16).astype(np.float32)
    return Dataset.from_dict({"x": x.tolist(), "label": labels[order].tolist()})


def _tensors(rows: Dataset) -> tuple[Tensor, Tensor]:
    return torch.tensor(rows["x"][:]), torch.tensor(rows["label"][:])
