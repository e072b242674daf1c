"""Handwritten digits and small networks that know a little about them."""

from functools import cache

import numpy as np
import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from torch import nn


@cache
def rows(start: int, stop: int) -> Dataset:
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[start:stop]
    return Dataset.from_dict({"x": (pixels[order] / 16).astype(np.float32).tolist(), "label": labels[order].tolist()})


def trained(network: nn.Module, steps: int = 60) -> nn.Module:
    """Train a network on the first 100 digits, not to the end: its gradients are to stay alive."""
    data = rows(0, 100).with_format("torch")[:]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(data["x"]), data["label"]).backward()
        optimizer.step()
    network.zero_grad()
    return network.eval()


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return trained(nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10)))


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return trained(
        nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(),
            nn.LayerNorm(48), nn.Linear(48, 10, bias=False),
        )
    )  # fmt: skip
