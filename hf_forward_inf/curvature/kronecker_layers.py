"""The layers whose curvature is factored: what of the parameters they hold, and which of them read the same inputs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_forward_inf.ascent.layers import Call, Sites, is_embedding, sides_of
from hf_forward_inf.ascent.low_rank import is_transposed
from hf_forward_inf.utils.storage import Tensors

WIDE = 4
"""A layer with more outputs than this multiple of its inputs, and than eigenpairs, is taken for an output layer over a
vocabulary: its outputs have a diagonal, which is most of the curvature of a softmax."""


@dataclass(frozen=True)
class Layer:
    """A matrix whose curvature is factored.

    Args:
        weight (`str`): Its name.
        bias (`str`, *optional*): The bias that belongs to it, where that is perturbed: one more input, which is 1.
        modules (`list[torch.nn.Module]`): The layers that multiply by it.
        inputs (`str`): The first of the weights that read the same inputs, and share that factor.
        by_row (`bool`): Whether the layers are called once for each example of a batch.
        is_tied (`bool`): Whether it is an embedding, too: that part has a curvature of its own, by row.
    """

    weight: str
    bias: str | None
    modules: list[nn.Module]
    inputs: str
    by_row: bool
    is_tied: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs, the bias's included."""
        outputs, inputs = sides_of(self.modules[0])
        return outputs, inputs + (self.bias is not None)

    def matrix(self, vector: Tensors) -> Tensor:
        """Return its part of a vector as `[outputs, inputs]`, with the bias as one more input."""
        weight = vector[self.weight]
        weight = weight.T if is_transposed(self.modules[0]) else weight.flatten(1)
        return weight if self.bias is None else torch.cat([weight, vector[self.bias][:, None]], dim=1)

    def parameters(self, matrix: Tensor, like: Tensors) -> Iterator[tuple[str, Tensor]]:
        """Return the parameters of a matrix: the inverse of [`matrix`]."""
        if self.bias is not None:
            yield self.bias, matrix[:, -1]
            matrix = matrix[:, :-1]
        weight = matrix.T if is_transposed(self.modules[0]) else matrix
        yield self.weight, weight.reshape(like[self.weight].shape)

    def read(self, one: Call) -> Tensor:
        """Return the inputs of a call, `[positions, inputs]`."""
        inputs = one.inputs()
        return inputs if self.bias is None else torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)

    def positions(self, calls: list[Call], rows: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and output gradients of all its calls, by example: `[rows, positions, side]`."""
        own = [one for one in calls if one.layer in self.modules]
        inputs = [self.read(one) for one in own]
        return (
            torch.cat([part.reshape(rows, -1, part.shape[-1]) for part in inputs], dim=1),
            torch.cat([part.reshape(rows, -1, part.shape[-1]) for part in (one.deltas() for one in own)], dim=1),
        )

    def is_wide(self, rank: int) -> bool:
        """Whether it is taken for an output layer over a vocabulary, if `rank` eigenpairs of a factor are stored."""
        outputs, inputs = self.shape
        return outputs > max(rank, WIDE * inputs)


def factored_layers(model: nn.Module, names: list[str], sites: Sites, calls: list[Call], rows: int) -> list[Layer]:
    """Return the factored layers.

    Args:
        model (`torch.nn.Module`): The model.
        names (`list[str]`): Parameters to perturb.
        sites (`dict`): Those that are matrices ([`layers.sites`]).
        calls (`list[Call]`): Calls of their layers in one batch: which of them read the same inputs?
        rows (`int`): Rows of that batch.
    """
    named = {id(p): name for name, p in model.named_parameters() if name in names}
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    affine = {name: [layer for layer in held if not is_embedding(layer)] for name, held in sites.items()}
    readers: dict[object, str] = {}
    layers = []
    for name, held in affine.items():
        if not held:
            continue
        own = [one for one in calls if one.layer in held]
        is_tied = len(held) < len(sites[name])
        bias = held[0]._parameters.get("bias") if len(held) == 1 and not is_tied else None
        bias_name = None if bias is None or holders[id(bias)] > 1 else named.get(id(bias))
        key: object = name
        if len(own) == 1 and not isinstance(held[0], nn.Conv2d):
            key = (own[0].given.data_ptr(), own[0].version, own[0].given.shape, bias_name is None)
        by_row = bool(own) and all(len(one.given) == rows for one in own)
        layers.append(Layer(name, bias_name, held, readers.setdefault(key, name), by_row, is_tied))
    return layers


def bytes_of_factors(layers: Sequence[Layer], rank: int) -> int:
    """Return the bytes of all factors with at most `rank` eigenpairs each."""
    inner = {layer.inputs: layer.shape[1] for layer in layers}
    outer = [(layer.shape[0], layer.is_wide(rank)) for layer in layers]
    sides = [*((side, False) for side in inner.values()), *outer]
    return sum(4 * side * (1 if wide else min(side, rank)) for side, wide in sides)
