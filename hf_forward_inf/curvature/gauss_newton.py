"""Products with the curvature of the training loss: Gauss-Newton and Hessian."""

from collections.abc import Iterable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_forward_inf.adapters.base import Adapter, Batch
from hf_forward_inf.ascent.parameters import call
from hf_forward_inf.curvature.solvers import Vector
from hf_forward_inf.utils.models import batch_size

GRAPH_BYTES = 2**30
"""Memory that graphs for products may take."""


Graph: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Vector]
"""Of a batch: outputs; the same as a leaf, and the loss's gradient by it; w, and J^T w."""


class GaussNewton:
    """The Gauss-Newton matrix of the mean loss over some examples, as products with vectors.

    G = 1/n sum J^T H J, with J the Jacobian of the model's outputs and H the Hessian of the loss by the outputs:
    positive semidefinite for any model. By double reverse mode, on the graph of J^T w: a product takes about 2 to 2.5
    forward passes over the sample if graphs stay in memory. Those beyond [`GRAPH_BYTES`] are rebuilt for every
    product, which costs up to twice as much, and bounds memory by that of a training step.

    Args:
        adapter (`Adapter`): Splits the loss (`Adapter.outputs_and_loss`).
        batches (`Iterable`): Batches of the sample, on the model's device.
        names (`list[str]`): Parameters to which the products are restricted.
    """

    def __init__(self, adapter: Adapter, batches: Iterable[Batch], names: list[str]):
        self.adapter = adapter
        own = dict(adapter.model.named_parameters())
        self.theta = {name: own[name].detach().requires_grad_() for name in names}
        self.batches = list(batches)
        self.rows = sum(map(batch_size, self.batches))
        self.graphs: list[Graph | None] = []
        room = GRAPH_BYTES
        for batch in self.batches:
            graph, size = self.graph(batch) if room > 0 else (None, 0)
            room -= size
            self.graphs.append(graph if room > 0 else None)

    def __call__(self, vector: Vector) -> Vector:
        """Return the product with a vector; sums are float32, whatever the model's precision."""
        total = [torch.zeros_like(p, dtype=torch.float32) for p in self.theta.values()]
        vector = [v.to(p.dtype) for v, p in zip(vector, self.theta.values(), strict=True)]
        for batch, graph in zip(self.batches, self.graphs, strict=True):
            outputs, leaf, slope, weights, back = graph or self.graph(batch)[0]
            with sdpa_kernel(SDPBackend.MATH):
                forward = torch.autograd.grad(back, weights, vector, retain_graph=True)[0]  # J v
                curved = torch.autograd.grad(slope, leaf, forward, retain_graph=True)[0]  # H J v
                found = _gradients(outputs, self.theta, curved, retain_graph=True)  # J^T H J v
            for sum_, part in zip(total, found, strict=True):
                sum_ += part / self.rows
        return total

    def graph(self, batch: Batch) -> tuple[Graph, int]:
        """Build a batch's graph; return it, and the bytes that it takes besides the weights."""
        sizes = {p.data_ptr(): 0 for p in self.adapter.model.parameters()}

        def count(tensor: Tensor) -> Tensor:
            sizes.setdefault(tensor.data_ptr(), tensor.numel() * tensor.element_size())
            return tensor

        counted = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        # Fused attention kernels have no second derivative.
        with counted, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            outputs, loss = self.adapter.outputs_and_loss(partial(call, self.adapter.model, self.theta), batch)
            leaf = outputs.detach().requires_grad_()
            slope = torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0]
            weights = torch.zeros_like(outputs, requires_grad=True)
            back = _gradients(outputs, self.theta, weights, create_graph=True)
        return (outputs, leaf, slope, weights, back), sum(sizes.values())


def hessian_product(adapter: Adapter, batch: Batch, names: list[str], vector: Vector) -> Vector:
    """Return the product of the Hessian of a batch's mean loss with a vector (Pearlmutter, 1994)."""
    own = dict(adapter.model.named_parameters())
    theta = {name: own[name].detach().requires_grad_() for name in names}
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        loss = adapter.loss(partial(call, adapter.model, theta), batch).mean()
        slopes = torch.autograd.grad(loss, list(theta.values()), create_graph=True, materialize_grads=True)
        slope = [s if s.requires_grad else s + 0 * p for s, p in zip(slopes, theta.values(), strict=True)]
        return list(torch.autograd.grad(slope, list(theta.values()), vector, materialize_grads=True))


def _gradients(outputs: Tensor, theta: dict[str, Tensor], weights: Tensor, **options: bool) -> Vector:
    parameters = list(theta.values())
    return list(torch.autograd.grad(outputs, parameters, weights, materialize_grads=True, **options))
