"""The two factors of a layer's curvature: symmetric matrices, exact or by their largest eigenpairs.

A factor is summed over the positions of a sample, batch by batch. Up to a number of inputs or outputs the whole matrix
is summed, beyond it a sketch: its product with a thin random matrix, from which the largest eigenpairs follow
(Nystrom's approximation in the stable form of Tropp et al., 2017).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_forward_inf.utils.models import without_autocast
from hf_forward_inf.utils.storage import Tensors


@dataclass(frozen=True)
class Side:
    """A positive semidefinite matrix: V diag(values) V^T + rest x (I - V V^T); a diagonal, if it has no vectors.

    Args:
        values (`Tensor`): Eigenvalues, `[eigenpairs]`.
        vectors (`Tensor`, *optional*): V, `[side, eigenpairs]`.
        rest (`float`, defaults to 0.0): The mean of all other eigenvalues.
    """

    values: Tensor
    vectors: Tensor | None = None
    rest: float = 0.0

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], name: str) -> "Side":
        """Return the side that [`tensors`] has stored."""
        vectors = tensors.get(f"{name}/vectors")
        return cls(tensors[f"{name}/values"], vectors, float(tensors[f"{name}/rest"]))

    def tensors(self, name: str) -> Tensors:
        """Return the side as tensors by name, to be stored."""
        found = {f"{name}/values": self.values, f"{name}/rest": torch.tensor(self.rest)}
        return found if self.vectors is None else found | {f"{name}/vectors": self.vectors}

    @property
    def is_complete(self) -> bool:
        """Whether all eigenpairs are known."""
        return self.vectors is None or self.vectors.shape[0] == self.vectors.shape[1]

    @property
    def mean(self) -> float:
        """The mean of all eigenvalues."""
        side = len(self.values) if self.vectors is None else len(self.vectors)
        return (self.values.double().sum().item() + self.rest * (side - len(self.values))) / side

    @without_autocast()
    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return coordinates by eigenvector, `[..., eigenpairs]`, and what lies in no eigenvector, `[..., side]`.

        Args:
            x (`Tensor`): `[..., side]`.
        """
        if self.vectors is None:
            return x, None
        vectors = self.vectors.to(x)  # a model may lie on several devices
        found = x @ vectors
        return found, None if self.is_complete else x - found @ vectors.T

    @without_autocast()
    def joined(self, coordinates: Tensor, others: Tensor | None) -> Tensor:
        """Return the vectors that [`split`] has split."""
        if self.vectors is not None:
            coordinates = coordinates @ self.vectors.T.to(coordinates)
        return coordinates if others is None else coordinates + others

    def apply(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Multiply `[..., side]` by the matrix with a function applied to its eigenvalues."""
        found, others = self.split(x)
        rest = function(found.new_tensor(self.rest))
        return self.joined(found * function(self.values.to(found)), None if others is None else others * rest)

    def times(self, x: Tensor) -> Tensor:
        """Multiply `[..., side]` by the matrix."""
        return self.apply(x, lambda values: values)

    def solve(self, x: Tensor, damping: float) -> Tensor:
        """Multiply `[..., side]` by the inverse of the matrix + damping x I."""
        return self.apply(x, lambda values: 1 / (values + damping))

    @without_autocast()
    def diagonal(self) -> Tensor:
        """Return the diagonal, `[side]`."""
        if self.vectors is None:
            return self.values
        return self.vectors.square() @ (self.values - self.rest) + self.rest


class Sum(Protocol):
    """A sum of outer products of vectors, from which a side is made."""

    def add(self, vectors: Tensor) -> None:
        """Add the outer products of some vectors with themselves, `[vectors, side]`."""
        ...

    def side(self, count: float) -> Side:
        """Return the sum / count."""
        ...


class Whole:
    """The whole matrix; all its eigenpairs."""

    def __init__(self, side: int, device: torch.device):
        self.total = torch.zeros(side, side, device=device)

    @without_autocast()
    def add(self, vectors: Tensor) -> None:
        """Add outer products; see [`Sum`]."""
        self.total.addmm_(vectors.T.float(), vectors.float())

    @without_autocast()
    def side(self, count: float) -> Side:
        """Return all eigenpairs.

        In float32: at a damping of 1e-3 of the largest eigenvalue, (A + s I)^-1 x is wrong by 6e-5 of its norm (side
        768, eigenvalues over three decades; 4e-7 with eigenvectors found in float64, in twice the time and memory).
        """
        values, vectors = torch.linalg.eigh(self.total / max(count, 1))
        return Side(values.clamp(min=0), vectors.contiguous())


class Sketch:
    """Products with a thin random matrix, and the trace; the largest eigenpairs, and the mean of all others."""

    def __init__(self, random: Tensor):
        self.random, self.trace = random, torch.zeros((), dtype=torch.float64, device=random.device)
        self.total = torch.zeros_like(random)

    @without_autocast()
    def add(self, vectors: Tensor) -> None:
        """Add outer products; see [`Sum`]."""
        vectors = vectors.float()
        self.total.addmm_(vectors.T, vectors @ self.random)
        self.trace += vectors.square().sum(dtype=torch.float64)

    @without_autocast()
    def side(self, count: float) -> Side:
        """Return at most as many eigenpairs as the random matrix has columns."""
        total, length = self.total / max(count, 1), len(self.total)
        shift = torch.finfo(total.dtype).eps * total.norm().item() * length**0.5
        total = total + shift * self.random
        core = (self.random.T @ total).double()
        values, basis = torch.linalg.eigh((core + core.T) / 2)
        half = total.double() @ (basis * values.clamp(min=shift or 1.0).rsqrt())
        squares, basis = torch.linalg.eigh(half.T @ half)
        found = squares > 2 * shift
        vectors = (half @ basis[:, found] * squares[found].rsqrt()).float()
        values = (squares[found] - shift).float()
        missing = self.trace.item() / max(count, 1) - values.double().sum().item()
        return Side(values, vectors, max(0.0, missing / max(1, length - len(values))))


class Squares:
    """The diagonal alone, for sides like a large vocabulary's."""

    def __init__(self, side: int, device: torch.device):
        self.total = torch.zeros(side, device=device)

    @without_autocast()
    def add(self, vectors: Tensor) -> None:
        """Add outer products; see [`Sum`]."""
        self.total += vectors.float().square().sum(0)

    @without_autocast()
    def side(self, count: float) -> Side:
        """Return the diagonal."""
        return Side(self.total / max(count, 1))
