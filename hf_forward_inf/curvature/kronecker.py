"""Kronecker factors of the curvature (K-FAC, EK-FAC): fitted once on a sample, used for every query's gradient."""

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_forward_inf.adapters.base import Adapter, Batch
from hf_forward_inf.ascent.parameters import call
from hf_forward_inf.curvature.example_gradients import AFFINE, Use, is_supported, recorded
from hf_forward_inf.curvature.outer_products import CHUNK_BYTES
from hf_forward_inf.curvature.sample import Sample
from hf_forward_inf.utils.models import batch_size
from hf_forward_inf.utils.storage import Tensors

LARGEST_SIDE = 8192
"""Layers with more inputs or outputs get a diagonal: eigenvectors take cubic time."""
TARGETS = 8192
"""Targets drawn in all, several for each prediction if the sample is small: K-FAC's LDS on digits was .69 with 800 and
.73 with 12,800, and another target costs no forward pass."""


@dataclass(frozen=True)
class Layer:
    """A layer whose curvature is factored: its module, and the names of its perturbed parameters."""

    module: nn.Module
    weight: str
    bias: str | None

    def matrix(self, vector: Tensors) -> Tensor:
        """Return its part of a vector as `[outputs, inputs]`, with the bias as one more input."""
        weight = vector[self.weight]
        weight = weight.T if isinstance(self.module, Conv1D) else weight.flatten(1)
        return weight if self.bias is None else torch.cat([weight, vector[self.bias][:, None]], dim=1)

    def parameters(self, matrix: Tensor, like: Tensors) -> Iterator[tuple[str, Tensor]]:
        """Return the parameters of a matrix: the inverse of [`matrix`]."""
        if self.bias is not None:
            yield self.bias, matrix[:, -1]
            matrix = matrix[:, :-1]
        weight = matrix.T if isinstance(self.module, Conv1D) else matrix
        yield self.weight, weight.reshape(like[self.weight].shape)

    def positions(self, uses: Sequence[Use]) -> tuple[Tensor, Tensor]:
        """Return the inputs and output gradients of all uses of the layer, `[rows, positions, side]`."""
        inputs, slopes = (torch.cat(parts, dim=1) for parts in zip(*(use.factors() for use in uses), strict=True))
        if self.bias is not None:
            inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
        return inputs, slopes


class KroneckerFit:
    """Fits factors on a sample, with targets drawn from the model's own predictions (the true Fisher matrix).

    The curvature of a linear layer or a convolution is approximated by the Kronecker product of two small matrices
    (Martens and Grosse, 2015): E[a a^T] of its inputs a, over positions, and the sum over positions of E[d d^T] of its
    output gradients d. EK-FAC (George et al., 2018) keeps their eigenvectors and replaces their eigenvalues by the
    mean squares of the examples' gradients in that basis. Positions whose output gradient is exactly 0 (padding, and
    whatever reaches no prediction) count in neither factor.

    Everything else (embeddings, normalisations, tied weights, layers of unknown kind or with more than 8192 inputs or
    outputs) gets a diagonal, the mean square of its gradients. It is computed batch by batch: drawn targets make the
    examples' gradients independent with mean 0, so the expected square of a sum is the sum of the expected squares.

    Args:
        sample (`Sample`): Training examples.
        names (`list[str]`): Parameters to perturb.
        seed (`int`): Seed of the drawn targets.
    """

    def __init__(self, sample: Sample, names: list[str], seed: int):
        self.sample, self.names, self.seed = sample, names, seed
        self.adapter: Adapter = sample.adapter
        self.layers = factored_layers(self.adapter, names, next(sample.batches(set(names))))
        factored = {name for layer in self.layers for name in (layer.weight, layer.bias)}
        self.rest = [name for name in names if name not in factored]
        draws = math.ceil(TARGETS / sum(sample.features["terms"]))
        self.draws = min(draws, self.adapter.max_draws or draws)
        self.rows = len(sample) * self.draws

    def factors(self) -> Tensors:
        """Fit both factors of every layer, and the diagonals of all other parameters.

        Returns:
            `dict`: Eigenvectors `inputs/<weight>` and `outputs/<weight>` (columns), the products of eigenvalues
            `curvature/<weight>` `[outputs, inputs]`, and `diagonal/<parameter>`.
        """
        inner: dict[str, Any] = defaultdict(float)
        outer: dict[str, Any] = defaultdict(float)
        found: Tensors = {}
        positions: Counter[str] = Counter()
        for uses, slopes in self._drawn(0):
            for name, slope in slopes.items():
                found[f"diagonal/{name}"] = found.get(f"diagonal/{name}", 0) + slope.float().square() / self.rows
            for layer, used in self._by_layer(uses):
                inputs, deltas = (side.flatten(0, 1) for side in layer.positions(used))
                live = deltas.any(dim=1)
                inputs, deltas = inputs[live], deltas[live]
                positions[layer.weight] += len(inputs)
                inner[layer.weight] += inputs.T @ inputs
                outer[layer.weight] += deltas.T @ deltas
        self._check_rank(positions)
        self._warn_of_unsupported()
        for layer in self.layers:
            name = layer.weight
            a, left = torch.linalg.eigh(inner[name].double() / positions[name])
            d, right = torch.linalg.eigh(outer[name].double() / self.rows)
            found |= {f"inputs/{name}": left.float(), f"outputs/{name}": right.float()}
            found[f"curvature/{name}"] = torch.outer(d.clamp(min=0), a.clamp(min=0)).float()
        return found

    def corrected(self, factors: Tensors) -> Tensors:
        """Return EK-FAC's `curvature/<weight>` in the basis of K-FAC's eigenvectors."""
        found: Tensors = {f"curvature/{layer.weight}": torch.zeros(()) for layer in self.layers}
        for uses, _ in self._drawn(1):
            for layer, used in self._by_layer(uses):
                name = layer.weight
                inputs, deltas = layer.positions(used)
                inputs, deltas = inputs @ factors[f"inputs/{name}"], deltas @ factors[f"outputs/{name}"]
                step = max(1, CHUNK_BYTES // (4 * inputs.shape[2] * deltas.shape[2]))
                for a, d in zip(inputs.split(step), deltas.split(step), strict=True):
                    squares = (d.transpose(1, 2) @ a).square().sum(0) / self.rows
                    found[f"curvature/{name}"] = found[f"curvature/{name}"].to(squares.device) + squares
        return found

    def _drawn(self, draw: int) -> Iterator[tuple[list[Use], Tensors]]:
        """Run every batch forwards, and backwards for drawn targets: yield uses of layers, gradients of the rest."""
        generator = torch.Generator().manual_seed(self.seed + draw)
        own = dict(self.adapter.model.named_parameters())
        for batch in self.sample.batches(set(self.names)):
            theta = {name: own[name].detach().requires_grad_() for name in self.names}
            with recorded([layer.module for layer in self.layers]) as uses, torch.enable_grad():
                outputs, _ = self.adapter.outputs_and_loss(partial(call, self.adapter.model, theta), batch)
            uses = [use for use in uses if use.output.requires_grad]  # some models run their blocks without it, too
            asked = [use.output for use in uses] + [theta[name] for name in self.rest]
            for left in reversed(range(self.draws)):
                slopes = self.adapter.sampled_output_gradients(outputs.detach(), generator).to(outputs.dtype)
                gradients = torch.autograd.grad(
                    outputs, asked, slopes, retain_graph=left > 0, allow_unused=True, materialize_grads=True
                )
                for use, gradient in zip(uses, gradients, strict=False):
                    use.gradient = gradient
                with torch.no_grad():
                    yield uses, dict(zip(self.rest, gradients[len(uses) :], strict=True))

    def _by_layer(self, uses: list[Use]) -> Iterator[tuple[Layer, list[Use]]]:
        for layer in self.layers:
            yield layer, [use for use in uses if use.module is layer.module]

    def _check_rank(self, positions: Counter[str]) -> None:
        for layer in self.layers:
            inputs, outputs = layer.matrix(dict(self.adapter.model.named_parameters())).shape[::-1]
            seen = positions[layer.weight] // self.draws
            if seen < max(inputs, outputs):
                warnings.warn(
                    f"{len(self.sample)} examples ({seen} positions) are too few for the factors "
                    f"of {layer.weight} ({inputs} inputs, {outputs} outputs), and perhaps of other layers: they are "
                    "singular, and in many directions only the damping counts. Raise sample.",
                    stacklevel=2,
                )
                return

    def _warn_of_unsupported(self) -> None:
        perturbed = {id(self.adapter.model.get_parameter(name)) for name in self.rest}
        owners = [
            f"{name} ({type(module).__name__})"
            for name, module in self.adapter.model.named_modules()
            if any(id(p) in perturbed for p in module.parameters(recurse=False)) and not is_supported(module)
        ]
        if owners:
            warnings.warn(
                f"Layers of unknown kind get a diagonal, not Kronecker factors: {', '.join(owners)}.",
                stacklevel=2,
            )


def factored_layers(adapter: Adapter, names: list[str], batch: Batch) -> list[Layer]:
    """Return the linear layers and convolutions that can be factored: not tied, and called once per example."""
    named = {id(p): name for name, p in adapter.model.named_parameters() if name in names}
    holders = Counter(id(p) for module in adapter.model.modules() for p in module.parameters(recurse=False))
    layers = []
    for module in adapter.model.modules():
        if not isinstance(module, AFFINE) or not is_supported(module):
            continue
        weight, bias = named.get(id(module.weight)), named.get(id(module.bias))
        if weight is None or holders[id(module.weight)] > 1 or max(module.weight.flatten(1).shape) > LARGEST_SIDE:
            continue
        layers.append(Layer(module, weight, bias if holders[id(module.bias)] == 1 else None))
    rows = batch_size(batch)
    with recorded([layer.module for layer in layers]) as uses, torch.no_grad():
        adapter.outputs_and_loss(partial(call, adapter.model, {}), batch)
    used = {use.module for use in uses}
    shared = {use.module for use in uses if len(use.input) != rows}
    return [layer for layer in layers if layer.module in used - shared]


def damped_inverse(
    vector: Sequence[Tensor],
    layers: Sequence[Layer],
    names: Sequence[str],
    fitted: Tensors,
    damping: float | None = None,
    shift: float | None = None,
) -> list[Tensor]:
    """Return (C + lambda I)^-1 v, with C the fitted curvature.

    Args:
        vector (`list[Tensor]`): v, one tensor for each parameter.
        layers (`list[Layer]`): The factored layers.
        names (`list[str]`): The parameters of the vector, in its order.
        fitted (`dict`): What [`KroneckerFit`] returned.
        damping (`float`, *optional*): lambda, as a multiple of the vector's Rayleigh quotient v.Cv / v.v.
        shift (`float`, *optional*): lambda itself, instead.
    """
    given = {name: value.float() for name, value in zip(names, vector, strict=True)}
    parts = _rotated(given, layers, fitted)
    if shift is None:
        assert damping is not None
        # Without any curvature, all directions are alike: the gradient itself.
        shift = damping * _quotient(parts) or 1.0
    solved = {name: part / (curvature + shift) for name, (part, curvature) in parts.items()}
    for layer in layers:
        left, right = fitted[f"outputs/{layer.weight}"], fitted[f"inputs/{layer.weight}"]
        solved |= dict(layer.parameters(left @ solved[layer.weight] @ right.T, given))
    return [solved[name] for name in names]


def rayleigh_quotient(
    vector: Sequence[Tensor], layers: Sequence[Layer], names: Sequence[str], fitted: Tensors
) -> float:
    """Return v.Cv / v.v, the curvature along a vector, 0 where there is none; arguments as in [`damped_inverse`]."""
    given = {name: value.float() for name, value in zip(names, vector, strict=True)}
    return _quotient(_rotated(given, layers, fitted))


def _rotated(given: Tensors, layers: Sequence[Layer], fitted: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a vector's parts in the basis of the eigenvectors, each with its curvatures."""
    parts = {}
    for layer in layers:
        left, right = fitted[f"outputs/{layer.weight}"], fitted[f"inputs/{layer.weight}"]
        parts[layer.weight] = (left.T @ layer.matrix(given) @ right, fitted[f"curvature/{layer.weight}"])
    for name, value in given.items():
        if f"diagonal/{name}" in fitted:
            parts[name] = (value, fitted[f"diagonal/{name}"])
    return parts


def _quotient(parts: dict[str, tuple[Tensor, Tensor]]) -> float:
    curved = sum((curvature * part.square()).sum().item() for part, curvature in parts.values())
    squared = sum(part.square().sum().item() for part, _ in parts.values())
    return curved / squared if curved > 0 and math.isfinite(curved / squared) else 0.0
