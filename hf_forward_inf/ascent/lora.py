"""Low-rank changes of linear layers, as LoRA has them: two thin matrices, added to a layer's output.

One step along the gradient of a linear layer is such a change, of rank at most the number of the query's tokens: the
gradient is the sum over tokens of output gradient times input. Forward hooks see both, so the weights may be
quantised: they are neither differentiated nor written to.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from hf_forward_inf.utils.models import linear_layers

RANK = 64
"""Default maximum rank; inference engines accept it without configuration."""


EXACT = 1e-12
"""Share of a change's squared norm that is below float32's precision."""


@dataclass(frozen=True)
class LowRank:
    """The change up @ down of a linear layer's weight, `[outputs, inputs]` (the transpose for GPT-2's Conv1D).

    Args:
        down (`Tensor`): LoRA's A, `[rank, inputs]`.
        up (`Tensor`): LoRA's B, `[outputs, rank]`.
    """

    down: Tensor
    up: Tensor

    def __add__(self, other: Self) -> "LowRank":
        return LowRank(torch.cat([self.down, other.down]), torch.cat([self.up, other.up], dim=1))

    def __mul__(self, factor: float) -> "LowRank":
        return LowRank(self.down, self.up * factor)

    def norm(self) -> float:
        """Return the Frobenius norm, without computing the product."""
        down, up = self.down.float(), self.up.float()
        return ((down @ down.T) * (up.T @ up)).sum().clamp(min=0).sqrt().item()

    def truncated(self, rank: int) -> tuple["LowRank", float]:
        """Return the best approximation of at most this rank, and the share of the squared norm that it loses.

        A lower rank is taken if it loses nothing.
        """
        (left, before), (right, after) = (torch.linalg.qr(side.float()) for side in (self.up, self.down.T))
        u, values, v = torch.linalg.svd(before @ after.T, full_matrices=False)
        squares = values.double().square()
        lost = squares.flip(0).cumsum(0).flip(0) / squares.sum().clamp(min=torch.finfo(torch.double).tiny)
        kept = max(1, min(rank, int((lost > EXACT).sum())))
        roots = values[:kept].sqrt()  # shared by both sides, so that neither overflows a half precision
        down, up = roots[:, None] * (right @ v[:kept].T).T, (left @ u[:, :kept]) * roots
        return LowRank(down.to(self.down.dtype), up.to(self.up.dtype)), float(lost[kept]) if kept < len(lost) else 0.0


@contextmanager
def added(model: nn.Module, changes: Mapping[str, LowRank]) -> Iterator[None]:
    """Add low-rank changes to the outputs of linear layers for the length of a `with`.

    Args:
        model (`torch.nn.Module`): The model; hooks are removed afterwards.
        changes (`dict[str, LowRank]`): By weight name.
    """

    def add(change: LowRank, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs = args[0].to(change.down.dtype)
        return output + (inputs @ change.down.T @ change.up.T).to(output.dtype)

    with _hooked(model, {name: partial(add, change) for name, change in changes.items()}):
        yield


def slopes(model: nn.Module, names: list[str], loss: Callable[[], Tensor]) -> dict[str, LowRank]:
    """Return the gradient of a loss with respect to linear layers' weights, without differentiating the weights.

    Args:
        model (`torch.nn.Module`): The model; hooks are removed afterwards.
        names (`list[str]`): Weights of linear layers.
        loss (`Callable`): Runs the model.
    """
    seen: list[tuple[str, Tensor, Tensor]] = []

    def probe(name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        zeros = torch.zeros_like(output, requires_grad=True)
        seen.append((name, args[0].detach().flatten(0, -2), zeros))
        return output + zeros

    with _hooked(model, {name: partial(probe, name) for name in names}):
        value = loss()
    gradients = torch.autograd.grad(value, [zeros for *_, zeros in seen], allow_unused=True, materialize_grads=True)
    found: dict[str, LowRank] = {}
    for (name, inputs, _), gradient in zip(seen, gradients, strict=True):
        change = LowRank(inputs.float(), gradient.flatten(0, -2).float().T)
        found[name] = found[name] + change if name in found else change
    return found


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    layers = linear_layers(model) if hooks else {}
    handles = []
    try:
        for name, hook in hooks.items():
            handles.append(layers[name].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
