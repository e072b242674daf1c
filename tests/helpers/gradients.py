"""Gradients of examples, computed one by one."""

import torch


def by_autograd(adapter, features, names):
    """One backward pass an example."""
    parameters = [adapter.model.get_parameter(name) for name in names]
    found = []
    for i in range(len(features["terms"])):
        batch = adapter.collate({key: values[i : i + 1] for key, values in features.items()})
        loss = adapter.loss(adapter.model, batch).sum()
        found.append(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    return {name: torch.stack([row[j] for row in found]).flatten(1) for j, name in enumerate(names)}
