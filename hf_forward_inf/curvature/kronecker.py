"""Kronecker factors of the curvature (K-FAC, EK-FAC): fitted once on a sample, used for every query's gradient."""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_forward_inf.adapters.base import Adapter, Batch
from hf_forward_inf.ascent.layers import Call, is_embedding, precise, probed, sites, watched
from hf_forward_inf.ascent.low_rank import LowRank
from hf_forward_inf.ascent.parameters import call
from hf_forward_inf.ascent.slopes import gradient_of_matrix
from hf_forward_inf.curvature.example_gradients import is_supported
from hf_forward_inf.curvature.kronecker_layers import bytes_of_factors, factored_layers
from hf_forward_inf.curvature.outer_products import CHUNK_BYTES
from hf_forward_inf.curvature.sample import Sample
from hf_forward_inf.curvature.sides import Side, Sketch, Squares, Sum, Whole
from hf_forward_inf.utils.models import batch_size, bytes_of_model, device_of, room_beside, without_autocast
from hf_forward_inf.utils.progress import shown
from hf_forward_inf.utils.sizes import MB, size_text
from hf_forward_inf.utils.storage import Tensors

T = TypeVar("T")
LARGEST_RANK = 2048
"""Eigenpairs of a factor at most, whatever the memory: eigenvectors take cubic time."""
LEAST_MEMORY = 64 * MB
"""Bytes that the factors of a small model may take, if no memory is set."""
TARGETS = 8192
"""Targets drawn in all, several for each prediction if the sample is small: K-FAC's LDS on digits was .69 with 800 and
.73 with 12,800, and another target costs no forward pass."""


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
            and 64 MB at least.

    Raises:
        ValueError: If the memory is not enough for one eigenpair of each factor.
    """

    def __init__(self, sample: Sample, names: list[str], seed: int, memory: float | None = None):
        self.sample, self.names, self.seed = sample, names, seed
        self.adapter: Adapter = sample.adapter
        pair = 2 * int(sample.lengths[:2].sum(1).max())  # of two rows, if they can be run together
        self.first = first = next(sample.batches(set(names), pair))
        found = sites(self.adapter.model, names)
        probes = probed([layer for held in found.values() for layer in held])
        with watched(self.adapter.model, found) as elsewhere, probes as calls, torch.no_grad():
            self._outputs(first, {})
        self.sites = {name: held for name, held in found.items() if name not in elsewhere}
        self.layers = factored_layers(self.adapter.model, names, self.sites, calls, batch_size(first))
        self.embeddings = [name for name, held in self.sites.items() if any(is_embedding(layer) for layer in held)]
        factored = {*self.sites, *(layer.bias for layer in self.layers)}
        self.rest = [name for name in names if name not in factored]
        draws = math.ceil(TARGETS / sum(sample.features["terms"]))
        self.draws = min(draws, self.adapter.max_draws or draws)
        self.rows = len(sample) * self.draws
        self.rank = self._rank(memory)

    def _outputs(self, batch: Batch, theta: Tensors) -> Tensor:
        return self.adapter.outputs_and_loss(partial(call, self.adapter.model, theta), batch)[0]

    def _rank(self, memory: float | None) -> int:
        """Return how many eigenpairs of each factor the memory allows."""
        size = bytes_of_model(self.adapter.model)
        room = max(size / 4, LEAST_MEMORY) if memory is None else memory * size
        allowed = [rank for rank in range(1, LARGEST_RANK + 1) if bytes_of_factors(self.layers, rank) <= room]
        if not allowed:
            least = bytes_of_factors(self.layers, 1)
            raise ValueError(
                f"memory={(memory or 0):g} is {size_text(room)}, and a single eigenpair of every factor takes "
                f"{size_text(least)}: give at least memory={math.ceil(1000 * least / size) / 1000:g}."
            )
        return max(allowed)

    @cached_property
    def batch_length(self) -> int:
        """How long batches may be: their activations take a twentieth of the model, or 64 MB."""
        taken: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            # Asked now: weights that are offloaded or sharded are whole only while their layer runs.
            weights = {p.data_ptr() for p in self.adapter.model.parameters() if type(p.data) is Tensor}
            taken[tensor.data_ptr()] = 0 if tensor.data_ptr() in weights else tensor.nbytes
            return tensor

        held = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        layers = [layer for held in self.sites.values() for layer in held]
        with probed(layers) as calls, torch.enable_grad(), held:
            outputs = self._outputs(self.first, {})
        read = sum(2 * one.probe.numel() * one.probe.element_size() + one.given.nbytes for one in calls)
        rows = batch_size(self.first)
        each = (sum(taken.values()) + read + 16 * outputs.numel()) / rows / self.sample.lengths[:rows].sum(1).max()
        return max(1, int(room_beside(self.adapter.model) / each))

    def witness(self) -> Tensor:
        """Return norms by which cached factors are checked, of two rows: outputs, and what each layer reads and gets.

        What flows back is the outputs' own, which is not drawn, nor nearly 0 where the model knows its rows by heart.
        """
        layers = [layer for held in self.sites.values() for layer in held]
        with probed(layers) as calls, torch.enable_grad():
            outputs = self._outputs(self.first, {})
        asked = [one.probe for one in calls]
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        slopes = torch.autograd.grad(outputs, asked, outputs.detach(), **options) if asked else ()
        values = [outputs.detach(), *(one.given for one in calls), *slopes]
        return torch.stack([value.float().norm().cpu() for value in values])

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
                read = [one for one in calls if one.layer in self.sites[name] and is_embedding(one.layer)]
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
            if layer.is_wide(self.rank)
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

    def corrected(self, factors: Mapping[str, Tensor]) -> Tensors:
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
                for one in made:
                    one.delta = None  # memory for the next ones
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
            asked = min(self.rank, max(inputs, 0 if layer.is_wide(self.rank) else outputs))
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
