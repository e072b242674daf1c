"""Linear regression with two parameters, its adapter, and states of a model to compare."""

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from hf_forward_inf.adapters import Adapter


class Line(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weights))

    def forward(self, x):
        return x @ self.w


class LineAdapter(Adapter):
    columns = ("x", "y")
    cache_key = "line"
    passes = 0

    def encode(self, rows):
        count = len(rows["y"])
        return {**rows, "terms": [1] * count, "truncated": [False] * count}

    def lengths(self, features):
        return np.ones((len(features["y"]), 1), dtype=int)

    def collate(self, features):
        return {key: torch.tensor(features[key], dtype=torch.float32) for key in ("x", "y")}

    def term_losses(self, forward, batch):
        self.passes += 1
        return (forward(x=batch["x"]) - batch["y"]).square()[:, None]


def points(*rows):
    return Dataset.from_dict({"x": [list(map(float, x)) for x, _ in rows], "y": [float(y) for _, y in rows]})


def state(model):
    """Everything that a user could find changed."""
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "identity": [id(p) for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
            for module in model.modules()
        ],
    }


def assert_same_state(before, after):
    for kind in ("parameters", "buffers"):
        assert before[kind].keys() == after[kind].keys()
        assert all(torch.equal(before[kind][name], after[kind][name]) for name in before[kind])
    for kind in ("identity", "training", "requires_grad", "gradients", "hooks"):
        assert before[kind] == after[kind]
