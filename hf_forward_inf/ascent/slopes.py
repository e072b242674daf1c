"""The gradient of a query's loss as changes of low rank, by what layers read and what flows back to them."""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from hf_forward_inf.ascent.layers import Call, Sites, precise, probed, sides_of, watched
from hf_forward_inf.ascent.low_rank import LowRank
from hf_forward_inf.ascent.parameters import Parameters, placed
from hf_forward_inf.utils.models import device_of

Changes: TypeAlias = dict[str, Tensor | LowRank]
"""By parameter, a direction or by how much it moves: outer products for a matrix, else float32 values."""


def slopes(
    model: nn.Module, names: list[str], layers: Sites, loss: Callable[[], Tensor], theta: Parameters
) -> Changes:
    """Return the gradient of a loss, without differentiating a weight matrix.

    Args:
        model (`torch.nn.Module`): The model; hooks are removed afterwards.
        names (`list[str]`): Parameters.
        layers (`dict`): Those among them that are matrices ([`layers.sites`]); any that the model reads outside of its
            layers is removed. Of all others (biases, normalisations, whatever layers of unknown kinds have) the
            gradient is dense.
        loss (`Callable`): Runs the model.
        theta (`dict`): The parameters at which the gradient is taken, where they are not the model's own.
    """
    own = dict(model.named_parameters())
    rest = {name: theta.get(name, own[name]) for name in names if name not in layers}
    leaves = {name: value.detach().requires_grad_() for name, value in rest.items() if isinstance(value, Tensor)}
    probes = probed([layer for held in layers.values() for layer in held])
    with placed(model, {**theta, **leaves}), probes as calls:
        with watched(model, layers) as elsewhere:
            value = loss()
        made = list(calls)  # a checkpointed block runs again, and calls its layers again, in the backward pass
        asked = [call.probe for call in made] + list(leaves.values())
        if not elsewhere:
            gradients = torch.autograd.grad(value, asked, allow_unused=True, materialize_grads=True)
    if elsewhere:
        for name in elsewhere:
            del layers[name]
        return slopes(model, names, layers, loss, theta)
    for call, gradient in zip(made, gradients, strict=False):
        call.delta = gradient
    found: Changes = {
        name: gradient_of_matrix(held, [call for call in made if call.layer in held]) for name, held in layers.items()
    }
    found |= {name: precise(one) for name, one in zip(leaves, gradients[len(made) :], strict=True)}
    return {name: found[name] for name in names}


def gradient_of_matrix(held: list[nn.Module], calls: list[Call]) -> LowRank:
    """Return the gradient of a matrix: the sum over all calls of its layers, without positions that have none."""
    outputs, inputs = sides_of(held[0])
    made = []
    for call in calls:
        given, deltas = call.inputs(), call.deltas()
        live = deltas.any(dim=1)
        given, deltas = given[live], deltas[live]
        is_embedding = isinstance(call.layer, nn.Embedding)
        made.append(LowRank.of_rows(outputs, given, deltas) if is_embedding else LowRank(given, deltas.T))
    like = made[0].down if made else torch.zeros(0, device=device_of(held[0]))
    return sum(made, start=LowRank(like.new_zeros(0, inputs), like.new_zeros(outputs, 0)))


def length_of(changes: Changes) -> float:
    """Return the Euclidean norm of all changes together."""
    norms = [one.norm() if isinstance(one, LowRank) else one.double().norm().item() for one in changes.values()]
    return math.hypot(*norms)


def added_up(one: Tensor | LowRank, other: Tensor | LowRank) -> Tensor | LowRank:
    """Return the sum of two changes of a parameter."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return (one + other).compact()
    assert isinstance(one, Tensor) and isinstance(other, Tensor)
    return one + other
