"""Gradients of every example of a batch, parameter by parameter, from activations and output gradients.

A layer's input and the gradient of its output give each example's gradient of its weights (an outer product summed
over positions), so one forward pass and one backward pass over activations serve a whole batch. Each parameter's
gradients are used and freed.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import mode
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from hf_forward_inf.adapters.base import Adapter, Batch, Forward, Rows
from hf_forward_inf.ascent.layers import AFFINE, given_to, multiplies, read_by, written_by
from hf_forward_inf.ascent.parameters import call
from hf_forward_inf.curvature.outer_products import CHUNK_BYTES, OuterProducts, Parts, QueryGradients, squared_norms
from hf_forward_inf.utils.models import batch_size, to_device

Objective: TypeAlias = Callable[[Forward], Tensor]
"""Given the model's forward, returns a sum of terms that depend on one example each."""


@dataclass
class Use:
    """One call of a layer: its input and output. A weight that several layers share has several uses.

    An example may pass a layer several times in one call, an image at several timesteps: its `copies` are adjacent.
    """

    module: nn.Module
    input: Tensor
    output: Tensor
    gradient: Tensor | None = None
    copies: int = 1

    def of(self, name: str, rows: slice) -> Tensor:
        """Return the gradient of parameter `name` for each of some examples, `[rows, numel]`."""
        if isinstance(self.module, (nn.Embedding, *AFFINE)):
            return self.factors(rows)[1].sum(1) if name == "bias" else self.matrix(rows).dense()
        given, delta = self._sides(rows)
        if name == "weight":  # an affine normalisation: its weight scales the output that a weight of one gives
            plain = {
                key: torch.ones_like(p) if key == "weight" else torch.zeros_like(p) for key, p in _own(self.module)
            }
            delta = delta * functional_call(self.module, plain, (given,)).float()
        if isinstance(self.module, nn.GroupNorm):
            delta = delta.movedim(1, -1)
        return self._together(delta.flatten(1, -2) if delta.dim() > 2 else delta[:, None]).sum(1)

    def _sides(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the input and the float32 output gradient of all copies of some examples."""
        assert self.gradient is not None
        start = None if rows.start is None else rows.start * self.copies
        stop = None if rows.stop is None else rows.stop * self.copies
        return self.input[start:stop], self.gradient[start:stop].float()

    def _together(self, values: Tensor) -> Tensor:
        """Concatenate the positions of an example's copies, `[rows, positions, width]`."""
        return values.reshape(-1, self.copies * values.shape[1], values.shape[2])

    def matrix(self, rows: slice = slice(None)) -> OuterProducts:
        """Return the gradients of the weight of an embedding or an affine layer, as outer products."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        if isinstance(self.module, nn.Embedding):
            ids, delta = self._sides(rows)
            delta = delta * getattr(self.module, "embed_scale", 1.0)
            if self.module.padding_idx is not None:
                delta = delta * (ids != self.module.padding_idx)[..., None]
            count = len(ids) // self.copies
            return OuterProducts(ids.reshape(count, -1), delta.reshape(count, -1, delta.shape[-1]), len(weight))
        given, delta = self.factors(rows)
        return (
            OuterProducts(given, delta, len(weight))
            if isinstance(self.module, Conv1D)
            else OuterProducts(delta, given, len(weight))
        )

    def factors(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return the inputs of an affine layer and its output gradients, position by position.

        A position is a token, or a place of a convolution's window, whose input is the patch under it.

        Returns:
            `tuple`: float32 `[rows, positions, inputs]` and `[rows, positions, outputs]`.
        """
        given, delta = self._sides(rows)
        return self._together(read_by(self.module, given).float()), self._together(written_by(self.module, delta))


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False, remove_duplicate=False))


class ExampleGradients:
    """The gradients of each example's loss, with respect to some parameters of the model.

    Linear layers, convolutions of images (without groups), embeddings, and affine normalisations of the last axis or
    of groups of channels are supported, tied weights included. What a whole batch shares (T5's relative position
    biases) has no gradient by example: `left_out` lists it, and parameters of other kinds of layers. Losses are
    summed over an example's terms.

    Args:
        adapter (`Adapter`): Gives the losses, and knows the model.
        names (`list[str]`): The parameters ([`parameters.perturbed_names`]).
        example (`dict[str, list]`): One encoded row, run to see which layers are called with a batch.

    Raises:
        ValueError: If none of the parameters has a gradient by example.
    """

    def __init__(self, adapter: Adapter, names: list[str], example: Rows):
        self.adapter = adapter
        self.model = adapter.model
        named = {id(p): name for name, p in self.model.named_parameters()}
        self.layers: dict[nn.Module, dict[str, str]] = {}
        for module in self.model.modules():
            own = {local: named[id(p)] for local, p in _own(module) if id(p) in named and named[id(p)] in names}
            if own and is_supported(module):
                self.layers[module] = own
        self._drop_what_a_batch_shares(example)
        # A tied weight counts only if every layer that uses it is supported.
        holders = defaultdict(list)
        for module in self.model.modules():
            for _, p in _own(module):
                holders[named.get(id(p))].append(module)
        self.names = [n for n in names if holders[n] and all(module in self.layers for module in holders[n])]
        self.left_out = [name for name in names if name not in self.names]
        if not self.names:
            raise ValueError(
                f"Gradients of {', '.join(names[:5])} can't be computed example by example. Choose linear layers, "
                "embeddings or normalisations with modules=[...]."
            )

    def _drop_what_a_batch_shares(self, example: Rows) -> None:
        """Run batches of two and of three examples: a layer whose input does not grow is shared by the batch."""
        shares: dict[nn.Module, set[float]] = defaultdict(set)
        for copies in (2, 3):
            batch = self.adapter.collate({key: values[:1] * copies for key, values in example.items()})
            with recorded(self.layers) as uses, torch.no_grad():
                self.adapter.loss(partial(call, self.model, {}), to_device(batch, self.model))
            for use in uses:
                shares[use.module].add(len(use.input) / copies)
        # How often an example passes a layer: once, or an image once at each timestep. If the count differs from that
        # of most layers, the first axis holds positions in an unknown order.
        usual = mode(max(share) for share in shares.values()) if shares else 1.0
        for module, share in shares.items():
            if share != {usual} or usual % 1:
                del self.layers[module]

    def with_adapter(self, adapter: Adapter) -> "ExampleGradients":
        """Return the same for batches and losses of another adapter of the same model."""
        other = copy.copy(self)
        other.adapter = adapter
        return other

    def uses(self, batch: Batch, objective: Objective | None = None) -> list[Use]:
        """Run a batch forwards and backwards: return every use of a layer that the objective depends on, in order.

        Args:
            batch (`dict`): On the model's device.
            objective (`Callable`, *optional*): Given the model's forward, returns what is differentiated. Defaults to
                the sum of the examples' losses.
        """
        # Leaves that share the model's memory; only the named ones have gradients, whatever the user froze.
        theta = {name: p.detach().requires_grad_(name in self.names) for name, p in self.model.named_parameters()}
        with recorded(self.layers) as uses, torch.enable_grad():
            forward = partial(call, self.model, theta)
            value = self.adapter.loss(forward, batch).sum() if objective is None else objective(forward)
        used = [use for use in uses if use.output.requires_grad]
        gradients = torch.autograd.grad(value, [use.output for use in used], allow_unused=True)
        for use, gradient in zip(used, gradients, strict=True):
            use.gradient, use.copies = gradient, len(use.output) // batch_size(batch)
        return [use for use in used if use.gradient is not None]

    def products(
        self, batch: Batch, directions: Mapping[str, Tensor | QueryGradients], squares: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return the dot products of each example's gradient with some directions; few gradients are materialised.

        Args:
            batch (`dict`): On the model's device.
            directions (`dict`): By parameter, dense `[directions, numel]`, or other examples' gradients as outer
                products.
            squares (`bool`, defaults to `True`): Whether to compute squared norms.

        Returns:
            `tuple`: float32 products `[rows, directions]`, and squared norms `[rows]`.
        """
        found, norms = [], []
        with torch.no_grad():
            for name, values in self.factored(batch):
                direction = directions[name]
                if isinstance(values, Tensor):
                    assert isinstance(direction, Tensor)
                    found.append(values @ direction.T)
                elif isinstance(direction, QueryGradients):
                    found.append(direction.products(values))
                else:
                    found += [part.products(direction) for part in values]
                if squares:
                    norms.append(values.square().sum(1) if isinstance(values, Tensor) else squared_norms(values))
        return torch.stack(found).sum(0), torch.stack(norms).sum(0) if squares else None

    def factored(self, batch: Batch) -> Iterator[tuple[str, Parts | Tensor]]:
        """Yield each parameter's gradients: outer products for a matrix, else dense, `[rows, numel]`."""
        serving = self._serving(batch)
        for name in (name for name in self.names if serving[name]):
            parts = _parts(serving[name])
            dense = (values for _, values in self._dense(name, serving[name], batch_size(batch)))
            yield name, torch.cat(list(dense)) if parts is None else parts

    def _serving(self, batch: Batch, objective: Objective | None = None) -> dict[str, list[tuple[Use, str]]]:
        """Return each parameter's uses, and its name there."""
        serving: dict[str, list[tuple[Use, str]]] = defaultdict(list)
        for use in self.uses(batch, objective):
            for local, name in self.layers[use.module].items():
                serving[name].append((use, local))
        return serving

    def _dense(self, name: str, uses: list[tuple[Use, str]], count: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield a parameter's dense gradients, some examples at a time: `[rows, numel]`."""
        step = max(1, CHUNK_BYTES // (4 * self.model.get_parameter(name).numel()))
        for start in range(0, count, step):
            rows = slice(start, min(count, start + step))
            parts = [use.of(local, rows) for use, local in uses]
            yield rows, sum(parts[1:], start=parts[0])

    def of(self, batch: Batch, objective: Objective | None = None) -> Iterator[tuple[str, slice, Tensor]]:
        """Yield `(parameter, rows, gradients)` for all parameters and examples, gradients float32 `[rows, numel]`.

        Arguments are those of [`uses`].
        """
        serving = self._serving(batch, objective)
        with torch.no_grad():
            for name in (name for name in self.names if serving[name]):
                for rows, values in self._dense(name, serving[name], batch_size(batch)):
                    yield name, rows, values


def _parts(uses: list[tuple[Use, str]]) -> Parts | None:
    """Return a matrix's gradients as outer products: of all embeddings, and of all other layers that use it.

    `None` if it is not a matrix.
    """
    if any(local != "weight" or not isinstance(use.module, (nn.Embedding, *AFFINE)) for use, local in uses):
        return None
    found = [use.matrix() for use, _ in uses]
    kinds = ([one for one in found if one.is_embedding == kind] for kind in (True, False))
    return [OuterProducts.joined(kind) for kind in kinds if kind]


def is_supported(module: nn.Module) -> bool:
    """Whether a layer's gradients follow from its inputs and its output gradients."""
    if isinstance(module, (*AFFINE, nn.Embedding)):
        return multiplies(module)
    if isinstance(module, nn.GroupNorm):
        return True
    # LayerNorm, and every family's own RMSNorm: vectors named weight and bias, and a name that says what it is.
    vectors = all(p.dim() == 1 and name in ("weight", "bias") for name, p in _own(module))
    return vectors and ("LayerNorm" in type(module).__name__ or "RMSNorm" in type(module).__name__)


@contextmanager
def recorded(layers: Iterable[nn.Module]) -> Iterator[list[Use]]:
    """Record every use of some layers for the length of a `with`; hooks are removed whatever happens."""
    uses: list[Use] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        uses.append(Use(module, given_to(args, kwargs).detach(), output))

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in layers]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()
