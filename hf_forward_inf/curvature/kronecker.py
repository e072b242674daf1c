"""Kronecker factors of the curvature (K-FAC, EK-FAC): fitted once on a sample, used for every query's gradient."""

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_forward_inf.adapters.base import Adapter, Batch
from hf_forward_inf.ascent.layers import Call, precise, probed, sides_of, sites, watched
from hf_forward_inf.ascent.low_rank import LowRank
from hf_forward_inf.ascent.parameters import call
from hf_forward_inf.ascent.slopes import gradient_of_matrix
from hf_forward_inf.curvature.example_gradients import is_supported
from hf_forward_inf.curvature.outer_products import CHUNK_BYTES
from hf_forward_inf.curvature.sample import Sample
from hf_forward_inf.curvature.sides import Side, Sketch, Squares, Sum, Whole
from hf_forward_inf.utils.models import batch_size, device_of, without_autocast
from hf_forward_inf.utils.progress import shown
from hf_forward_inf.utils.storage import Tensors

T = TypeVar("T")
LARGEST_RANK = 2048
"""Eigenpairs of a factor at most, whatever the memory: eigenvectors take cubic time."""
LEAST_MEMORY = 64 * 2**20
"""Bytes that the factors of a small model may take, if no memory is set."""
WIDE = 4
"""A layer with more outputs than this multiple of its inputs, and than eigenpairs, is taken for an output layer over a
vocabulary: its outputs have a diagonal, which is most of the curvature of a softmax."""
TARGETS = 8192
"""Targets drawn in all, several for each prediction if the sample is small: K-FAC's LDS on digits was .69 with 800 and
.73 with 12,800, and another target costs no forward pass."""


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
        weight = weight.T if isinstance(self.modules[0], Conv1D) else weight.flatten(1)
        return weight if self.bias is None else torch.cat([weight, vector[self.bias][:, None]], dim=1)

    def parameters(self, matrix: Tensor, like: Tensors) -> Iterator[tuple[str, Tensor]]:
        """Return the parameters of a matrix: the inverse of [`matrix`]."""
        if self.bias is not None:
            yield self.bias, matrix[:, -1]
            matrix = matrix[:, :-1]
        weight = matrix.T if isinstance(self.modules[0], Conv1D) else matrix
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


class KroneckerFit:
    """Fits factors on a sample, with targets drawn from the model's own predictions (the true Fisher matrix).

    The curvature of a linear layer or a convolution is approximated by the Kronecker product of two small matrices
    (Martens and Grosse, 2015): E[a a^T] of its inputs a, over positions, and the sum over positions of E[d d^T] of its
    output gradients d. EK-FAC (George et al., 2018) keeps their eigenvectors and replaces their eigenvalues by the
    mean squares of the examples' gradients in that basis. Positions whose output gradient is exactly 0 (padding, and
    whatever reaches no prediction) count in neither factor. Layers that read the same inputs share that factor.

    Of each factor the largest eigenpairs are stored, as many as `memory` allows and at most [`LARGEST_RANK`], and the
    mean of the other eigenvalues; of smaller factors all. The outputs of an output layer over a large vocabulary have
    a diagonal. So have embeddings (only rows that the sample reads), normalisations, and layers of unknown kind, the
    mean square of their gradients. It is computed batch by batch: drawn targets make the examples' gradients
    independent with mean 0, so the expected square of a sum is the sum of the expected squares.

    No weight matrix is differentiated, and few rows are run at a time: memory is about that of a forward pass, and
    the factors.

    Args:
        sample (`Sample`): Training examples.
        names (`list[str]`): Parameters to perturb.
        seed (`int`): Seed of the drawn targets.
        memory (`float`, *optional*): Bytes for the factors, as a share of those of the model. Defaults to a quarter,
            and 64 MiB at least.

    Raises:
        ValueError: If the memory is not enough for one eigenpair of each factor.
    """

    def __init__(self, sample: Sample, names: list[str], seed: int, memory: float | None = None):
        self.sample, self.names, self.seed = sample, names, seed
        self.adapter: Adapter = sample.adapter
        pair = 2 * int(sample.lengths[:2].sum(1).max())  # of two rows, if they can be run together
        first = next(sample.batches(set(names), pair))
        self.sites = sites(self.adapter.model, names)
        with watched(self.adapter.model, self.sites) as elsewhere, torch.no_grad():
            self._outputs(first, {})
        self.sites = {name: held for name, held in self.sites.items() if name not in elsewhere}
        self.layers = self._layers(first)
        self.embeddings = [name for name, held in self.sites.items() if any(_is_embedding(layer) for layer in held)]
        factored = {*self.sites, *(layer.bias for layer in self.layers)}
        self.rest = [name for name in names if name not in factored]
        draws = math.ceil(TARGETS / sum(sample.features["terms"]))
        self.draws = min(draws, self.adapter.max_draws or draws)
        self.rows = len(sample) * self.draws
        self.rank = self._rank(memory)
        self.batch_length = self._batch_length(first)

    def _outputs(self, batch: Batch, theta: Tensors) -> Tensor:
        return self.adapter.outputs_and_loss(partial(call, self.adapter.model, theta), batch)[0]

    def _layers(self, batch: Batch) -> list[Layer]:
        """Return the factored layers, by running one batch: which of them read the same inputs?"""
        model = self.adapter.model
        named = {id(p): name for name, p in model.named_parameters() if name in self.names}
        holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        affine = {name: [layer for layer in held if not _is_embedding(layer)] for name, held in self.sites.items()}
        with probed([layer for held in affine.values() for layer in held]) as calls, torch.no_grad():
            self._outputs(batch, {})
        readers: dict[object, str] = {}
        layers = []
        for name, held in affine.items():
            if not held:
                continue
            own = [one for one in calls if one.layer in held]
            is_tied = len(held) < len(self.sites[name])
            bias = held[0]._parameters.get("bias") if len(held) == 1 and not is_tied else None
            bias_name = None if bias is None or holders[id(bias)] > 1 else named.get(id(bias))
            key: object = name
            if len(own) == 1 and not isinstance(held[0], nn.Conv2d):
                key = (own[0].given.data_ptr(), own[0].version, own[0].given.shape, bias_name is None)
            by_row = bool(own) and all(len(one.given) == batch_size(batch) for one in own)
            layers.append(Layer(name, bias_name, held, readers.setdefault(key, name), by_row, is_tied))
        return layers

    @property
    def _model_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.adapter.model.parameters())

    def _rank(self, memory: float | None) -> int:
        """Return how many eigenpairs of each factor the memory allows."""
        size = self._model_bytes
        room = max(size / 4, LEAST_MEMORY) if memory is None else memory * size
        inner = {layer.inputs: layer.shape[1] for layer in self.layers}
        sides = [*inner.values(), *(layer.shape[0] for layer in self.layers)]

        def needed(rank: int) -> float:
            wide = {layer.shape[0] for layer in self.layers if _is_wide(layer, rank)}
            return sum(4.0 * side * (1 if side in wide else min(side, rank)) for side in sides)

        allowed = [rank for rank in range(1, LARGEST_RANK + 1) if needed(rank) <= room]
        if not allowed:
            raise ValueError(
                f"memory={(memory or 0):g} is {room / 2**20:.1f} MiB, and a single eigenpair of every factor takes "
                f"{needed(1) / 2**20:.1f} MiB: give at least memory={math.ceil(1000 * needed(1) / size) / 1000:g}."
            )
        return max(allowed)

    def _batch_length(self, batch: Batch) -> int:
        """Return how long batches may be: their activations take a twentieth of the model, or 64 MiB."""
        parameters = {p.data_ptr() for p in self.adapter.model.parameters()}
        taken: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            taken[tensor.data_ptr()] = 0 if tensor.data_ptr() in parameters else tensor.nbytes
            return tensor

        held = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        layers = [layer for held in self.sites.values() for layer in held]
        with probed(layers) as calls, torch.enable_grad(), held:
            outputs = self._outputs(batch, {})
        read = sum(2 * one.probe.numel() * one.probe.element_size() + one.given.nbytes for one in calls)
        rows = batch_size(batch)
        each = (sum(taken.values()) + read + 16 * outputs.numel()) / rows / self.sample.lengths[:rows].sum(1).max()
        return max(1, int(max(self._model_bytes / 20, LEAST_MEMORY) / each))

    def factors(self) -> Tensors:
        """Fit both factors of every layer, and the diagonals of all other parameters.

        Returns:
            `dict`: [`sides.Side`]s `inputs/<weight>` and `outputs/<weight>`, the mean squares `diagonal/<parameter>`,
            and those of an embedding's rows, `rows/<weight>`, with their numbers `ids/<weight>`.
        """
        found: Tensors = {}
        inner, outer = self._sums()
        positions: Counter[str] = Counter()
        for calls, slopes, draw in self._drawn(0):
            for name, slope in slopes.items():
                found[f"diagonal/{name}"] = found.get(f"diagonal/{name}", 0) + precise(slope).square() / self.rows
            for name in self.embeddings:
                read = [one for one in calls if one.layer in self.sites[name] and _is_embedding(one.layer)]
                self._add_rows(found, name, gradient_of_matrix(self.sites[name], read))
            for leader, inputs in self._inputs(calls) if draw == 0 else ():
                positions[leader] += len(inputs)
                inner[leader].add(inputs)
            for layer in self.layers:
                for one in calls:
                    if one.layer in layer.modules:
                        outer[layer.weight].add(one.deltas())
        self._check_rank(positions)
        self._warn_of_unsupported()
        for kind, sums in (("inputs", inner), ("outputs", outer)):
            for name in shown(list(sums), "eigenvectors", len(sums), "matrices"):
                count = positions[name] if kind == "inputs" else self.rows
                found |= sums.pop(name).side(count).tensors(f"{kind}/{name}")
        return found

    def _sums(self) -> tuple[dict[str, Sum], dict[str, Sum]]:
        """Return what sums up the factors of inputs and of outputs."""
        device = {layer.weight: device_of(layer.modules[0]) for layer in self.layers}
        sides = [side for layer in self.layers for side in layer.shape if side > self.rank]
        generator = torch.Generator().manual_seed(self.seed)
        thin = torch.randn(max(sides, default=0), self.rank, generator=generator)

        def of(side: int, name: str) -> Sum:
            place = device[name]
            return Whole(side, place) if side <= self.rank else Sketch(thin[:side].to(place))

        inner = {layer.inputs: of(layer.shape[1], layer.weight) for layer in self.layers}
        outer = {
            layer.weight: Squares(layer.shape[0], device[layer.weight])
            if _is_wide(layer, self.rank)
            else of(layer.shape[0], layer.weight)
            for layer in self.layers
        }
        return inner, outer

    def _inputs(self, calls: list[Call]) -> Iterator[tuple[str, Tensor]]:
        """Yield what layers read, once for all that read the same: positions at which any has an output gradient."""
        for leader in dict.fromkeys(layer.inputs for layer in self.layers):
            group = [layer for layer in self.layers if layer.inputs == leader]
            own = [[one for one in calls if one.layer in layer.modules] for layer in group]
            if not own[0]:
                continue
            live = torch.stack([torch.cat([one.deltas().any(1) for one in made]) for made in own]).any(0)
            yield leader, torch.cat([group[0].read(one) for one in own[0]])[live]

    def _add_rows(self, found: Tensors, name: str, gradient: LowRank) -> None:
        """Add the squares of a batch's gradient of an embedding."""
        ids, squares = gradient.ids, gradient.rows.square() / self.rows
        if f"ids/{name}" in found:
            ids, squares = torch.cat([found[f"ids/{name}"], ids]), torch.cat([found[f"rows/{name}"], squares])
        summed = LowRank.of_rows(gradient.shape[0], ids, squares)
        found |= {f"ids/{name}": summed.ids, f"rows/{name}": summed.rows}

    def corrected(self, factors: Tensors) -> Tensors:
        """Return EK-FAC's `curvature/<weight>` in the basis of K-FAC's eigenvectors, where it has all of them."""
        turned = [
            (layer, Side.read(factors, f"outputs/{layer.weight}"), Side.read(factors, f"inputs/{layer.inputs}"))
            for layer in self.layers
            if layer.by_row and not layer.is_tied
        ]
        turned = [(layer, outer, inner) for layer, outer, inner in turned if outer.is_complete and inner.is_complete]
        found: Tensors = {f"curvature/{layer.weight}": torch.zeros(()) for layer, *_ in turned}
        for calls, _, _ in self._drawn(1):
            for layer, outer, inner in turned:
                inputs, deltas = layer.positions(calls, self.batch_rows)
                inputs, deltas = inner.split(inputs)[0], outer.split(deltas)[0]
                step = max(1, CHUNK_BYTES // (4 * inputs.shape[2] * deltas.shape[2]))
                for a, d in zip(inputs.split(step), deltas.split(step), strict=True):
                    with without_autocast():
                        squares = (d.transpose(1, 2) @ a).square().sum(0) / self.rows
                    found[f"curvature/{layer.weight}"] = (
                        found[f"curvature/{layer.weight}"].to(squares.device) + squares
                    )
        return found

    def _drawn(self, seed: int) -> Iterator[tuple[list[Call], Tensors, int]]:
        """Run every batch forwards, and backwards for drawn targets: yield calls of layers, gradients of the rest."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        own = dict(self.adapter.model.named_parameters())
        batches = list(self.sample.batches(set(self.names), self.batch_length))
        title = f"Kronecker factors, up to {self.rank} eigenpairs"
        for batch in shown(batches, title, len(self.sample), "rows", batch_size):
            self.batch_rows = batch_size(batch)
            leaves = {name: own[name].detach().requires_grad_() for name in self.rest}
            with probed([layer for held in self.sites.values() for layer in held]) as calls, torch.enable_grad():
                outputs = self._outputs(batch, leaves)
            made = [*calls]
            asked = [one.probe for one in made] + list(leaves.values())
            for draw in range(self.draws):
                slopes = self.adapter.sampled_output_gradients(outputs.detach(), generator).to(outputs.dtype)
                gradients = torch.autograd.grad(
                    outputs,
                    asked,
                    slopes,
                    retain_graph=draw + 1 < self.draws,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for one, gradient in zip(made, gradients, strict=False):
                    one.delta = gradient
                with torch.no_grad():
                    yield made, dict(zip(self.rest, gradients[len(made) :], strict=True)), draw

    def _check_rank(self, positions: Counter[str]) -> None:
        for layer in self.layers:
            outputs, inputs = layer.shape
            seen = positions[layer.inputs]
            asked = min(self.rank, max(inputs, 0 if _is_wide(layer, self.rank) else outputs))
            if 0 < seen < asked:
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


def _is_embedding(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding)


def _is_wide(layer: Layer, rank: int) -> bool:
    outputs, inputs = layer.shape
    return outputs > max(rank, WIDE * inputs)
