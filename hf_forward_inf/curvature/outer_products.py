"""Gradients of a weight matrix as sums of outer products: products with them need not materialise them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from torch import Tensor

CHUNK_BYTES = 128 * 2**20
"""Memory for gradients of one parameter; a batch that would take more is split."""
TRAFFIC = 64
"""Cost of materialising a gradient, in dot products with it (measured on a CPU)."""


@dataclass(frozen=True)
class OuterProducts:
    """For each example, the sum over positions of row side x column side: the gradient of a matrix.

    Args:
        rows (`Tensor`): `[examples, positions, height]`; for an embedding, whose row side is one-hot, the indices:
            integers `[examples, positions]`.
        columns (`Tensor`): `[examples, positions, width]`.
        height (`int`): Rows of the matrix.
    """

    rows: Tensor
    columns: Tensor
    height: int

    @property
    def is_embedding(self) -> bool:
        """Whether row sides are one-hot, given as indices."""
        return not self.rows.is_floating_point()

    @property
    def size(self) -> tuple[int, int, int]:
        """Number of positions, rows and columns."""
        return self.columns.shape[1], self.height, self.columns.shape[2]

    @classmethod
    def joined(cls, parts: Sequence["OuterProducts"]) -> Self:
        """Return the sum of several: their positions concatenated."""
        rows, columns = (torch.cat(side, 1) for side in zip(*((one.rows, one.columns) for one in parts), strict=True))
        return cls(rows, columns, parts[0].height)

    def dense(self) -> Tensor:
        """Materialise the gradients, `[examples, height x width]`."""
        if not self.is_embedding:
            return (self.rows.transpose(1, 2) @ self.columns).flatten(1)
        found = self.columns.new_zeros(len(self.rows), self.height, self.columns.shape[2])
        return found.scatter_add_(1, self.rows[..., None].expand_as(self.columns), self.columns).flatten(1)

    def chunks(self) -> Iterator[Tensor]:
        """Materialise the gradients, some examples at a time."""
        step = max(1, CHUNK_BYTES // (4 * math.prod(self.size[1:])))
        for rows, columns in zip(self.rows.split(step), self.columns.split(step), strict=True):
            yield OuterProducts(rows, columns, self.height).dense()

    def pairs(self, other: "OuterProducts") -> Tensor:
        """Return the dot products of all pairs of outer products, `[examples, positions, other's positions]`.

        `other` has the same examples, or a single one for all.
        """
        return _dots(self.rows, other.rows) * (self.columns @ other.columns.transpose(1, 2))

    def products(self, directions: Tensor) -> Tensor:
        """Return the dot products of the gradients with `[directions, numel]`: `[examples, directions]`."""
        (positions, height, width), count = self.size, len(directions)
        matrices = directions.view(count, height, width)
        if self.is_embedding:
            return torch.stack([(matrix[self.rows] * self.columns).sum((1, 2)) for matrix in matrices], dim=1)
        if positions * count > positions + count + TRAFFIC:
            return torch.cat([values @ directions.T for values in self.chunks()])
        large, small = self.rows, self.columns  # the product with the larger side is small
        if height < width:
            large, small, matrices = small, large, matrices.transpose(1, 2)
        return torch.stack([((large @ matrix) * small).sum((1, 2)) for matrix in matrices], dim=1)


Parts: TypeAlias = Sequence[OuterProducts]
"""A gradient that is a sum: of an embedding's part, and of the part of an output layer tied to it."""


def squared_norms(parts: Parts) -> Tensor:
    """Return the gradients' squared norms, `[examples]`: sums over all pairs of positions."""
    if len(parts) == 1 and not parts[0].is_embedding:
        positions, height, width = parts[0].size
        if positions * (height + width) > height * width:
            return torch.cat([values.square().sum(1) for values in parts[0].chunks()])
    return torch.stack([one.pairs(other).sum((1, 2)) for one in parts for other in parts]).sum(0)


@dataclass(frozen=True)
class QueryGradients:
    """Gradients of several queries as outer products, their positions concatenated.

    Args:
        parts (`list[OuterProducts]`): A single example with all positions.
        owners (`list[Tensor]`): For each part, the query that a position belongs to.
        squares (`Tensor`): Squared norms, `[queries]`.
    """

    parts: Parts
    owners: Sequence[Tensor]
    squares: Tensor

    @classmethod
    def of(cls, queries: Mapping[int, Parts], count: int) -> Self:
        """Concatenate gradients of single queries, by query number; the others of `count` queries have none."""
        parts, owners = [], []
        for kind in (True, False):
            found = [(i, part) for i, query in queries.items() for part in query if part.is_embedding == kind]
            if found:
                parts.append(OuterProducts.joined([part for _, part in found]))
                owner = torch.tensor([i for i, _ in found], device=parts[-1].columns.device)
                lengths = torch.tensor([part.size[0] for _, part in found], device=owner.device)
                owners.append(owner.repeat_interleave(lengths))
        squares = parts[0].columns.new_zeros(count)
        for i, query in queries.items():
            squares[i] = squared_norms(query)[0]
        return cls(parts, owners, squares)

    def products(self, parts: Parts) -> Tensor:
        """Return the dot products with other examples' gradients, `[examples, queries]`."""
        found = self.squares.new_zeros(len(parts[0].columns), len(self.squares))
        for mine, owner in zip(self.parts, self.owners, strict=True):
            for part in parts:
                found.index_add_(1, owner, part.pairs(mine).sum(1))
        return found

    def is_cheaper(self) -> bool:
        """Whether products are cheaper than with dense gradients, for examples about as long as the queries."""
        count = len(self.squares)
        for part in self.parts:
            total, height, width = part.size
            length = total / count
            written = min(length * count, length + count + TRAFFIC)
            is_dense_cheaper = (
                total > height if part.is_embedding else length * total * (height + width) > written * height * width
            )
            if is_dense_cheaper:
                return False
        return True

    def dense(self) -> Tensor:
        """Materialise the gradients, `[queries, numel]`."""
        _, height, width = self.parts[0].size
        found = self.squares.new_zeros(len(self.squares), height, width)
        for part, owner in zip(self.parts, self.owners, strict=True):
            if part.is_embedding:
                found.index_put_((owner, part.rows[0]), part.columns[0], accumulate=True)
                continue
            for query in owner.unique():
                found[query] += part.rows[0, owner == query].T @ part.columns[0, owner == query]
        return found.flatten(1)


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Return the dot products of row sides, `[examples, left's positions, right's positions]`."""
    if left.is_floating_point() and right.is_floating_point():
        return left @ right.transpose(1, 2)
    if left.is_floating_point():
        return torch.take_along_dim(left, right[:, None], 2)
    if right.is_floating_point():
        return torch.take_along_dim(right, left[:, None], 2).transpose(1, 2)
    return left[:, :, None] == right[:, None]
