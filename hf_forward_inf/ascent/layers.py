"""Layers that multiply by a matrix: what they read and what flows back to them give the gradient of the matrix.

Hooks see both, so that a weight need be neither differentiated nor written to: it may be quantised, or frozen.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

AFFINE = (nn.Linear, Conv1D, nn.Conv2d)
"""Layers that multiply their input, at every position, by one matrix."""
Sites: TypeAlias = dict[str, list[nn.Module]]
"""Matrices whose gradients are sums of outer products, by name: the layers that use each of them."""


def has_plain_weight(module: nn.Module) -> bool:
    """Whether a layer's weight is an ordinary tensor, not one of 8 or 4 bits."""
    weight = module.weight
    return isinstance(weight, Tensor) and weight.is_floating_point() and type(weight.data) is Tensor


def multiplies(module: nn.Module) -> bool:
    """Whether a layer multiplies by its weight as its class says: linear, a convolution of images, an embedding."""
    if isinstance(module, nn.Conv2d) and (module.groups > 1 or module.padding_mode != "zeros"):
        return False
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return False
    for kind in (*AFFINE, nn.Embedding):
        if isinstance(module, kind):
            # A subclass may do something else with its weight; scaling (BART's embeddings) is taken into account.
            plain = type(module).forward is kind.forward or hasattr(module, "embed_scale")
            return plain or (kind is nn.Linear and not has_plain_weight(module))
    return False


def is_embedding(layer: nn.Module) -> bool:
    """Whether a layer reads rows of its weight by their numbers."""
    return isinstance(layer, nn.Embedding)


def sides_of(layer: nn.Module) -> tuple[int, int]:
    """Return the outputs and inputs of a layer's matrix, for packed weights, too."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.in_channels * math.prod(layer.kernel_size)
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features


def holders(model: nn.Module, names: Iterable[str]) -> Sites:
    """Return the layers that hold each of some weights; several if they share it.

    Raises:
        KeyError: If the model has no such parameter.
    """
    own = dict(model.named_parameters())
    wanted = {id(own[name]): name for name in names}
    found: Sites = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            if id(parameter) in wanted:
                found[wanted[id(parameter)]].append(module)
    return dict(found)


def sites(model: nn.Module, names: Iterable[str]) -> Sites:
    """Return which of some parameters are matrices that only layers of known kinds hold, and these layers."""
    return {
        name: layers
        for name, layers in holders(model, names).items()
        if all(multiplies(layer) and layer._parameters.get("weight") is not None for layer in layers)
        and all(model.get_parameter(name) is layer.weight for layer in layers)
    }


@contextmanager
def watched(model: nn.Module, among: Sites) -> Iterator[set[str]]:
    """Collect the names of the weights that are read outside of the layers that hold them, as by fused attention.

    What layers read and what flows back to them is not all of such a weight's gradient.
    """
    named = {id(model.get_parameter(name)): name for name in among}
    entered: dict[str, int] = defaultdict(int)
    found: set[str] = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(function, "__name__", "") != "__get__":  # dtype, device and the like
                for value in _flat([*args, *(kwargs or {}).values()]):
                    name = named.get(id(value))
                    if name is not None and not entered[name]:
                        found.add(name)
            return function(*args, **(kwargs or {}))

    def enter(name: str, change: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            entered[name] += change

        return count

    with ExitStack() as stack, Watch():
        for name, layers in among.items():
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(enter(name, 1)).remove)
                stack.callback(layer.register_forward_hook(enter(name, -1)).remove)
        yield found


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


@dataclass
class Call:
    """One call of a layer: its input, a zero that was added to its output, and then that zero's gradient."""

    layer: nn.Module
    given: Tensor
    probe: Tensor
    delta: Tensor | None = None
    version: int = field(init=False)
    """How often the input has been written to: the layer's gradient is by what it was then."""

    def __post_init__(self) -> None:
        self.version = self.given._version

    def inputs(self) -> Tensor:
        """Return what the layer's matrix multiplies, `[positions, inputs]`; of an embedding, ids `[positions]`."""
        if self.given._version != self.version:
            raise ValueError(
                f"What a {type(self.layer).__name__} has read is overwritten afterwards, so that its gradient doesn't "
                "follow from it: take step='full', or perturb other layers with modules=[...]."
            )
        if isinstance(self.layer, nn.Embedding):
            return self.given.flatten()
        return read_by(self.layer, self.given).flatten(0, 1)

    def deltas(self) -> Tensor:
        """Return the gradients of the matrix's products, `[positions, outputs]`."""
        assert self.delta is not None
        if not isinstance(self.layer, nn.Embedding):
            return written_by(self.layer, self.delta).flatten(0, 1)
        delta = precise(self.delta).flatten(0, -2) * getattr(self.layer, "embed_scale", 1.0)
        if self.layer.padding_idx is not None:  # never trained
            delta = delta * (self.given.flatten() != self.layer.padding_idx)[:, None]
        return delta


@contextmanager
def probed(layers: Collection[nn.Module]) -> Iterator[list[Call]]:
    """Add a zero to every output of some layers, for the length of a `with`: its gradient is the output's.

    No weight has to require a gradient for that. The zeros take no memory: they are one number, expanded.
    """
    calls: list[Call] = []

    def probe(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        zero = output.detach().new_zeros(()).expand(output.shape).requires_grad_()
        calls.append(Call(layer, given_to(args, kwargs).detach(), zero))
        return output + zero

    with ExitStack() as stack:
        for layer in dict.fromkeys(layers):
            # Before the user's own hooks: what they make of an output is part of what follows the layer.
            stack.callback(layer.register_forward_hook(probe, with_kwargs=True, prepend=True).remove)
        yield calls


def given_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a layer's call, which may be named."""
    return args[0] if args else next(iter(kwargs.values()))


def precise(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def read_by(layer: nn.Module, given: Tensor) -> Tensor:
    """Return what an affine layer's matrix multiplies, float32 `[rows, positions, inputs]`.

    A position is a token, or a place of a convolution's window, whose input is the patch under it.
    """
    given = precise(given)
    if isinstance(layer, nn.Conv2d):
        return _patches(given, layer).transpose(1, 2)
    return _by_position(given)


def written_by(layer: nn.Module, delta: Tensor) -> Tensor:
    """Return the gradient of an affine layer's output by position, float32 `[rows, positions, outputs]`."""
    delta = precise(delta)
    return delta.flatten(2).transpose(1, 2) if isinstance(layer, nn.Conv2d) else _by_position(delta)


def _by_position(values: Tensor) -> Tensor:
    return values.flatten(1, -2) if values.dim() > 2 else values.view(-1, 1, values.shape[-1])


def _patches(images: Tensor, layer: nn.Conv2d) -> Tensor:
    """Return the patches of images that a convolution multiplies, `[rows, channels x height x width, places]`."""
    return F.unfold(padded(images, layer), layer.kernel_size, layer.dilation, 0, layer.stride)


def padded(images: Tensor, layer: nn.Conv2d) -> Tensor:
    """Return images with the zeros around them that a convolution reads; "same" has an odd one at the end."""
    if isinstance(layer.padding, str):
        windows = zip(layer.dilation, layer.kernel_size, strict=True)
        sums = [step * (size - 1) if layer.padding == "same" else 0 for step, size in windows]
        edges = [(both // 2, both - both // 2) for both in sums]
    else:
        edges = [(edge, edge) for edge in layer.padding]
    return F.pad(images, [*edges[1], *edges[0]])  # the last axis first
