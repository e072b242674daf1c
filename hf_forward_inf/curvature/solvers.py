"""Solvers of linear systems that need nothing but products with the matrix."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Vector: TypeAlias = list[Tensor]
"""A direction in parameter space: one tensor a parameter, in the parameters' order."""


UNSETTLED = 0.2
"""Conjugate gradients have not converged if the last product brought more than this share of their progress."""


NOTHING_NEW = 1e-3
"""A vector whose part outside a space is a smaller share of its norm lies in it, as far as float32 can say."""


Product: TypeAlias = Callable[[Vector], Vector]
"""A symmetric matrix, as a function that multiplies a vector by it."""


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the dot product of two vectors, summed in float64."""
    return sum(torch.sum(x.double() * y.double()).item() for x, y in zip(a, b, strict=True))


def warn_of_residual(residual: float, products: int) -> None:
    """Warn that conjugate gradients have not converged."""
    warnings.warn(
        f"Conjugate gradients have not converged: after {products} products the residual is {residual:.0%} of the "
        "gradient. The best iterate is used. Raise iterations, or damping.",
        stacklevel=3,
    )


def conjugate_gradients(
    product: Product,
    right: Sequence[Tensor],
    *,
    iterations: int = 10,
    damping: float = 0.1,
    tolerance: float = 1e-5,
    on_unconverged: Callable[[float, int], None] = warn_of_residual,
) -> Vector:
    """Solve (G + lambda I) x = b by conjugate gradients.

    Few iterations are a regularisation of their own, so that a large residual is no error. The best iterate is
    returned, which in exact arithmetic is the last: the one with the least x.(G + lambda I)x / 2 - b.x.

    Args:
        product (`Callable`): Products with G, positive semidefinite.
        right (`list[Tensor]`): b.
        iterations (`int`, defaults to 10): Maximum number of products.
        damping (`float`, defaults to 0.1): lambda, as a multiple of b's Rayleigh quotient b.Gb / b.b: relative to the
            curvature along b.
        tolerance (`float`, defaults to 1e-5): Stops at this residual, relative to the norm of b; float32 reaches no
            smaller one.
        on_unconverged (`Callable`, *optional*): Called with the relative residual and the number of products, if the
            last product brought more than a fifth of all progress. Warns by default.

    Raises:
        FloatingPointError: If a product is not finite.
    """
    right = [b.float() for b in right]
    squared = dot(right, right)
    if squared == 0:
        return [torch.zeros_like(b) for b in right]
    first = product(right)
    shift = damping * dot(right, first) / squared
    x = [torch.zeros_like(b) for b in right]
    residual, direction = [b.clone() for b in right], [b.clone() for b in right]
    left = squared
    best, lowest, unsolved, gained = x, 0.0, squared, 0.0
    for i in range(iterations):
        curved = [g + shift * d for g, d in zip(product(direction) if i else first, direction, strict=True)]
        bend = dot(direction, curved)
        if not math.isfinite(bend):
            raise FloatingPointError("A Gauss-Newton product is not finite: load the model in float32 or bfloat16.")
        if bend <= 0:
            break  # a direction without curvature, or the end of float32's precision
        step = left / bend
        x = [a + step * d for a, d in zip(x, direction, strict=True)]
        residual = [r - step * c for r, c in zip(residual, curved, strict=True)]
        before, left = left, dot(residual, residual)
        height = -(dot(right, x) + dot(residual, x)) / 2
        gained = lowest - height
        if gained > 0:
            best, lowest, unsolved = x, height, left
        if left <= tolerance**2 * squared:
            break
        direction = [r + left / before * d for r, d in zip(residual, direction, strict=True)]
    if gained > -UNSETTLED * lowest:
        on_unconverged(math.sqrt(unsolved / squared), i + 1)
    return best


class KrylovSpace:
    """A space in which (G + lambda I) x = b is solved for several b, preconditioned: block conjugate gradients.

    It begins with the preconditioned right sides, and each round adds the preconditioned residuals of all of them. A
    solution is the best one in the whole space (Rayleigh-Ritz), so that each right side profits from the products of
    all others: after one round it is at least as good as the best multiple of its own preconditioned b.

    Args:
        product (`Callable`): Products with G, positive semidefinite.
        precondition (`Callable`): Products with an approximation of (G + lambda I)^-1.
        rights (`list[list[Tensor]]`): The right sides.
        iterations (`int`): Number of rounds, of at most one product for each right side.
        shift (`float`): lambda.

    Raises:
        FloatingPointError: If a product is not finite.
    """

    def __init__(
        self,
        product: Product,
        precondition: Product,
        rights: Sequence[Sequence[Tensor]],
        iterations: int,
        shift: float,
    ):
        self.product, self.precondition, self.iterations, self.shift = product, precondition, iterations, shift
        self.like = [b.float() for b in rights[0]]
        flat = torch.stack([_flat(b) for b in rights])
        none = flat[:0]
        self.basis, self.products = self._grown(none, none, flat / flat.norm(dim=1, keepdim=True))

    def solve(self, right: Sequence[Tensor]) -> Vector:
        """Return x for a right side; one that is not among the space's own takes products for itself alone."""
        flat = _flat(right)[None]
        basis, products = self.basis, self.products
        if len(self._new_directions(basis, self._preconditioned(flat))):
            basis, products = self._grown(basis, products, flat)
        return self._parts(self._coefficients(basis, products, flat) @ basis)[0]

    def _grown(self, basis: Tensor, products: Tensor, rights: Tensor) -> tuple[Tensor, Tensor]:
        """Return an orthonormal basis and its products after further rounds for some right sides, `[size, numel]`."""
        left = rights
        for _ in range(self.iterations):
            if len(basis):
                solution = self._coefficients(basis, products, rights)
                left = rights - solution @ (products + self.shift * basis)
            new = self._new_directions(basis, self._preconditioned(left))
            if not len(new):
                break
            found = torch.stack([_flat(self.product(one)) for one in self._parts(new)])
            if not found.isfinite().all():
                raise FloatingPointError(
                    "A Gauss-Newton product is not finite: load the model in float32 or bfloat16."
                )
            basis, products = torch.cat([basis, new]), torch.cat([products, found])
        return basis, products

    def _coefficients(self, basis: Tensor, products: Tensor, rights: Tensor) -> Tensor:
        """Return the coordinates of the best solutions in a basis, `[rights, size]`."""
        matrix = (basis @ products.T).double()
        matrix = (matrix + matrix.T) / 2 + self.shift * torch.eye(len(basis), dtype=torch.float64, device=basis.device)
        return torch.linalg.solve(matrix, (basis @ rights.T).double()).T.to(basis.dtype)

    def _new_directions(self, basis: Tensor, vectors: Tensor) -> Tensor:
        """Return an orthonormal basis of what some vectors add to the space."""
        found = vectors[:0]
        for vector in vectors:
            size = vector.norm()
            for _ in range(2):  # once is not enough in float32
                for known in (basis, found):
                    vector = vector - (known @ vector) @ known
            if vector.norm() > NOTHING_NEW * size:
                found = torch.cat([found, (vector / vector.norm())[None]])
        return found

    def _preconditioned(self, vectors: Tensor) -> Tensor:
        return torch.stack([_flat(self.precondition(one)) for one in self._parts(vectors)])

    def _parts(self, vectors: Tensor) -> list[Vector]:
        """Return flat vectors as parts of the parameters' shapes."""
        split = [vector.split([part.numel() for part in self.like]) for vector in vectors]
        return [
            [part.view_as(like).to(like.device) for part, like in zip(parts, self.like, strict=True)]
            for parts in split
        ]


def _flat(vector: Sequence[Tensor]) -> Tensor:
    """Return a vector as one tensor, on the device of its first part: a model may lie on several."""
    return torch.cat([part.float().flatten().to(vector[0].device) for part in vector])


def lissa(
    products: Callable[[int], Product],
    right: Sequence[Tensor],
    *,
    depth: int,
    scale: float,
    damping: float,
    repeats: int = 1,
) -> Vector:
    """Estimate (H + lambda I)^-1 b by LiSSA (Agarwal et al., 2017; Koh and Liang, 2017).

    h <- b + (1 - damping) h - H_j h / scale, from h = b, for `depth` random batches j; the mean of h / scale over
    repeats. Its fixed point has lambda = damping x scale.

    Args:
        products (`Callable`): Given a number, returns products with the Hessian of the batch drawn with it.
        right (`list[Tensor]`): b.
        depth (`int`): Steps.
        scale (`float`): Must exceed the largest eigenvalue of every batch's Hessian.
        damping (`float`): Between 0 and 1.
        repeats (`int`, defaults to 1): Number of estimates to average.

    Raises:
        FloatingPointError: If the recursion diverges.
    """
    bound = 1e6 * math.sqrt(dot(right, right)) / max(damping, 1e-6)
    total = [torch.zeros_like(b) for b in right]
    for repeat in range(repeats):
        h = [b.clone() for b in right]
        for step in range(depth):
            curved = products(repeat * depth + step)(h)
            h = [b + (1 - damping) * a - c / scale for b, a, c in zip(right, h, curved, strict=True)]
            norm = math.sqrt(dot(h, h))
            if not norm < bound:
                raise FloatingPointError(
                    f"LiSSA diverges (norm {norm:.2g} after {step + 1} of {depth} steps): the Hessian has eigenvalues "
                    f"beyond scale={scale:g}. Raise scale, or damping={damping:g} where it is not convex."
                )
        total = [t + a / scale / repeats for t, a in zip(total, h, strict=True)]
    return total
