"""Changes of weight matrices as sums of outer products: they take little memory, and the weights stay untouched.

One step along the gradient of a linear layer is such a change, of rank at most the number of the query's tokens: the
gradient is the sum over tokens of output gradient times input. Of an embedding, it changes a few rows.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from hf_forward_inf.ascent.layers import given_to, has_plain_weight, holders
from hf_forward_inf.utils.models import without_autocast

EXACT = 1e-12
"""Share of a change's squared norm that is below float32's precision."""
COPIED = 64 * 2**20
"""Bytes of a weight up to which a changed copy is made for a call."""


@dataclass(frozen=True)
class LowRank:
    """The change up @ down of a weight `[outputs, inputs]`, and of some of its rows.

    For GPT-2's Conv1D it is the transpose of the weight that changes so, for a convolution the weight with its last
    three axes flattened. An embedding's rows are its outputs: tied to an output layer, both have the same matrix.

    Args:
        down (`Tensor`): LoRA's A, `[rank, inputs]`.
        up (`Tensor`): LoRA's B, `[outputs, rank]`.
        ids (`Tensor`, *optional*): Rows that change by themselves, each once, ascending: `[rows]`. Defaults to none.
        rows (`Tensor`, *optional*): By how much, `[rows, inputs]`.
    """

    down: Tensor
    up: Tensor
    ids: Tensor = None  # type: ignore[assignment]
    rows: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.ids is None:
            object.__setattr__(self, "ids", torch.zeros(0, dtype=torch.long, device=self.down.device))
            object.__setattr__(self, "rows", self.down.new_zeros(0, self.down.shape[1]))

    @classmethod
    def of_rows(cls, height: int, ids: Tensor, rows: Tensor) -> Self:
        """Return a change of rows alone; the changes of a row that comes several times are added."""
        unique, place = torch.unique(ids, return_inverse=True)
        summed = rows.new_zeros(len(unique), rows.shape[1]).index_add_(0, place, rows)
        return cls(rows.new_zeros(0, rows.shape[1]), rows.new_zeros(height, 0), unique, summed)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def size(self) -> int:
        """Number of values."""
        return self.down.numel() + self.up.numel() + self.rows.numel()

    def __add__(self, other: Self) -> "LowRank":
        down, up = torch.cat([self.down, other.down]), torch.cat([self.up, other.up], dim=1)
        ids, rows = torch.cat([self.ids, other.ids]), torch.cat([self.rows, other.rows])
        summed = LowRank.of_rows(len(up), ids, rows) if len(ids) else self
        return LowRank(down, up, summed.ids, summed.rows)

    def __mul__(self, factor: float) -> "LowRank":
        return LowRank(self.down, self.up * factor, self.ids, self.rows * factor)

    @without_autocast()
    def norm(self) -> float:
        """Return the Frobenius norm, without computing the product."""
        squared = ((self.down @ self.down.T) * (self.up.T @ self.up)).double().sum()
        if len(self.ids):
            squared = squared + (self.rows * (self.rows + 2 * self.up[self.ids] @ self.down)).double().sum()
        return squared.clamp(min=0).sqrt().item()

    @without_autocast()
    def dense(self) -> Tensor:
        """Compute the product, `[outputs, inputs]`."""
        return (self.up @ self.down).index_add_(0, self.ids, self.rows)

    def without_rows(self) -> "LowRank":
        """Return the same change with an outer product in place of each row that changes by itself."""
        one = self.up.new_zeros(len(self.up), len(self.ids))
        one[self.ids, torch.arange(len(self.ids), device=one.device)] = 1.0
        return LowRank(torch.cat([self.down, self.rows]), torch.cat([self.up, one], dim=1))

    @without_autocast()
    def compact(self) -> "LowRank":
        """Return the same change with no more outer products than the matrix has rows or columns."""
        outputs, inputs = self.shape
        if len(self.down) <= min(outputs, inputs):
            return self
        product, one = self.up @ self.down, partial(torch.eye, dtype=self.up.dtype, device=self.up.device)
        down, up = (one(inputs), product) if inputs <= outputs else (product, one(outputs))
        return LowRank(down, up, self.ids, self.rows)

    @without_autocast()
    def truncated(self, rank: int) -> tuple["LowRank", float]:
        """Return the best approximation of at most this rank, and the share of the squared norm that it loses.

        A lower rank is taken if it loses nothing. Rows that change by themselves are left as they are.
        """
        if not len(self.down):
            return self, 0.0
        (left, before), (right, after) = (torch.linalg.qr(side.float()) for side in (self.up, self.down.T))
        u, values, v = torch.linalg.svd(before @ after.T, full_matrices=False)
        squares = values.double().square()
        lost = squares.flip(0).cumsum(0).flip(0) / squares.sum().clamp(min=torch.finfo(torch.double).tiny)
        kept = max(1, min(rank, int((lost > EXACT).sum())))
        roots = values[:kept].sqrt()  # shared by both sides, so that neither overflows a half precision
        down, up = roots[:, None] * (right @ v[:kept].T).T, (left @ u[:, :kept]) * roots
        change = LowRank(down.to(self.down.dtype), up.to(self.up.dtype), self.ids, self.rows)
        return change, float(lost[kept]) if kept < len(lost) else 0.0

    @without_autocast()
    def through(self, layer: nn.Module, given: Tensor) -> Tensor:
        """Return by how much the output of a layer changes, given its input."""
        if isinstance(layer, nn.Embedding):
            return self._looked_up(given) * getattr(layer, "embed_scale", 1.0)
        given = given.to(self.down.dtype)
        if isinstance(layer, nn.Conv2d):
            thin = self.down.view(-1, layer.in_channels, *layer.kernel_size)
            passed = F.conv2d(given, thin, None, layer.stride, layer.padding, layer.dilation)
            return F.conv2d(passed, self.up[..., None, None])
        found = given @ self.down.T @ self.up.T
        return found.index_add_(-1, self.ids, given @ self.rows.T) if len(self.ids) else found

    def _looked_up(self, ids: Tensor) -> Tensor:
        found = F.embedding(ids, self.up) @ self.down
        if not len(self.ids):
            return found
        place = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        return found + F.embedding(place, self.rows) * (self.ids[place] == ids)[..., None]

    def added_to(self, weight: Tensor, layer: nn.Module) -> Tensor:
        """Return the changed weight of a layer."""
        change = self.dense()
        change = change.T if is_transposed(layer) else change
        return (weight.detach() + change.reshape(weight.shape)).to(weight.dtype)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer's weight is `[inputs, outputs]`, as GPT-2's Conv1D has it."""
    return type(layer).__name__ == "Conv1D"


@contextmanager
def added(model: nn.Module, changes: Mapping[str, LowRank]) -> Iterator[None]:
    """Change weights by outer products wherever they are held, for the length of a `with`.

    What a change adds to a layer's output is added by a hook, and the weight is left alone. Where a forward pass has
    so many positions that a changed copy of the weight is less work, the layer multiplies by such a copy, which is
    freed after it (four layers of width 512, rank 12, 2,048 tokens: 2% of the pass, against 26% by hooks).

    Args:
        model (`torch.nn.Module`): The model; hooks are removed afterwards.
        changes (`dict[str, LowRank]`): By weight name. A weight that several layers share changes in all of them.

    Raises:
        KeyError: If the model has no such weight.
    """
    layers = holders(model, changes) if changes else {}
    places = [_Place(layer, change) for name, change in changes.items() for layer in layers[name]]
    with ExitStack() as stack:
        for place in places:
            stack.callback(place.layer.register_forward_pre_hook(place.enter, with_kwargs=True).remove)
            stack.callback(place.layer.register_forward_hook(place.leave, with_kwargs=True, prepend=True).remove)
            stack.callback(place.restore)
        yield


@dataclass
class _Place:
    """A layer that holds a changed weight."""

    layer: nn.Module
    change: LowRank
    weight: nn.Parameter | None = None
    """The layer's own, while a changed copy is in its place."""

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Put a changed copy in the weight's place, if that is less work."""
        if self._is_copied(given_to(args, kwargs)):
            weight = layer._parameters["weight"]
            assert weight is not None
            layer._parameters["weight"] = self.change.added_to(weight, layer)  # type: ignore[assignment]
            self.weight = weight

    def leave(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add to the output what no copy of the weight has."""
        if self.weight is not None:
            self.restore()
            return output
        moved = self.change.through(layer, given_to(args, kwargs))
        return (output.to(moved.dtype) + moved).to(output.dtype)

    def restore(self) -> None:
        """Put the weight back."""
        if self.weight is not None:
            self.layer._parameters["weight"], self.weight = self.weight, None

    def _is_copied(self, given: Tensor) -> bool:
        # Not while a graph is built, which would hold all copies; of half precision, a copy would be rounded.
        if torch.is_grad_enabled() or isinstance(self.layer, nn.Embedding) or not has_plain_weight(self.layer):
            return False
        weight: Any = self.layer.weight
        if weight.dtype not in (torch.float32, torch.float64) or weight.nbytes > COPIED:
            return False
        width = given.shape[1] if isinstance(self.layer, nn.Conv2d) else given.shape[-1]
        outputs, inputs = self.change.shape
        return given.numel() // width * (outputs + inputs) > outputs * inputs
