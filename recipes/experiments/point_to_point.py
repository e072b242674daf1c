"""The hypothesis where training has no noise: one example against one query, logistic regression (section 2.1)."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hf_forward_inf.utils.processes import process_state

ITERATIONS = 1000
"""Steps of L-BFGS at most, as in the paper."""
TOLERANCE = 1e-10
"""Largest slope of the objective at the end of a fit; one example's influence is a thousand times larger or more."""
NEARBY = 100
"""Steps with the Hessian of a minimum nearby, after which it is taken to be too far away."""
TOGETHER = 100
"""Fits made at once."""


@dataclass(frozen=True)
class LogisticRegression:
    """Mean cross-entropy plus l2 / 2 x squared norm: strictly convex, so there is one minimum, however it is reached.

    Args:
        inputs (`Tensor`): float64 `[rows, features]`; a constant feature makes the bias.
        labels (`Tensor`): Integers from 0, `[rows]`.
        classes (`int`): How many.
        l2 (`float`, defaults to 1e-3): The paper's.
    """

    inputs: Tensor
    labels: Tensor
    classes: int
    l2: float = 1e-3

    def fit(self, shares: Tensor) -> Tensor:
        """Minimise by L-BFGS, from 0.

        Args:
            shares (`Tensor`): float64 `[rows]`, the rows' weights in the mean: 0 for who is left out.

        Returns:
            `Tensor`: float64 `[features, classes]`.
        """
        theta = torch.zeros(self.inputs.shape[1], self.classes, dtype=torch.float64)
        optimizer = torch.optim.LBFGS(
            [theta], max_iter=ITERATIONS, max_eval=2 * ITERATIONS, history_size=20, line_search_fn="strong_wolfe",
            tolerance_grad=1e-6, tolerance_change=0,
        )  # fmt: skip

        def objective() -> Tensor:
            theta.grad = self._slopes(theta[None], shares[None])[0]
            return shares @ self.losses(theta) + self.l2 / 2 * theta.square().sum()

        optimizer.step(objective)
        # Below differences of 1e-16 in the objective a line search is lost; slopes alone lead on.
        (theta,), reached = self._descended(theta[None], self.factor(theta, shares), shares[None])
        if not reached.all():
            raise FloatingPointError("The logistic regression does not converge: raise l2.")
        return theta

    def factor(self, theta: Tensor, shares: Tensor) -> Tensor:
        """Give the Cholesky factor of the objective's Hessian, `[features x classes, features x classes]`."""
        chances = (self.inputs @ theta).softmax(dim=1)
        blocks = [
            [self.inputs.T @ ((shares * chances[:, a] * (int(a == b) - chances[:, b]))[:, None] * self.inputs)
             for b in range(self.classes)] for a in range(self.classes)
        ]  # fmt: skip
        hessian = torch.stack([torch.stack(row) for row in blocks])  # [classes, classes, features, features]
        size = self.inputs.shape[1] * self.classes
        hessian = hessian.permute(2, 0, 3, 1).reshape(size, size)
        hessian.diagonal().add_(self.l2)
        return torch.linalg.cholesky(hessian)

    def refit(self, start: Tensor, factor: Tensor, shares: Tensor) -> Tensor:
        """Minimise for several other weights of the rows, from a minimum nearby and with the Hessian there.

        Args:
            start (`Tensor`): `[features, classes]`.
            factor (`Tensor`): From [`factor`].
            shares (`Tensor`): `[fits, rows]`.

        Returns:
            `Tensor`: `[fits, features, classes]`.
        """
        theta, reached = self._descended(start.repeat(len(shares), 1, 1), factor, shares)
        for fit in (~reached).nonzero().flatten().tolist():  # so far away that the Hessian there leads astray
            theta[fit] = self.fit(shares[fit])
        return theta

    def _descended(self, theta: Tensor, factor: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Take Newton's steps with one Hessian for all; tell which fits have reached their minimum."""
        for _ in range(NEARBY):
            slopes = self._slopes(theta, shares)
            reached = slopes.abs().amax(dim=(1, 2)) < TOLERANCE
            if reached.all():
                break
            theta = theta - torch.cholesky_solve(slopes.flatten(1).T, factor).T.view_as(theta)
        return theta, reached

    def losses(self, theta: Tensor) -> Tensor:
        """Give the loss of every row, `[rows]`."""
        return F.cross_entropy(self.inputs @ theta, self.labels, reduction="none")

    def _slopes(self, theta: Tensor, shares: Tensor) -> Tensor:
        errors = (self.inputs @ theta).softmax(dim=2) - F.one_hot(self.labels, self.classes)
        return self.inputs.T @ (shares[..., None] * errors) + self.l2 * theta


@dataclass(frozen=True)
class Influences:
    """Both sides of the mirror; higher means a stronger proponent, so both are minus the paper's.

    Args:
        to_query (`np.ndarray`): Inf(D_i -> D_tst): how much the query's loss rises without example i,
            `[queries, examples]`.
        from_query (`np.ndarray`): Inf(D_i <- D_tst): how much example i's loss falls when the query is trained on.
    """

    to_query: np.ndarray
    from_query: np.ndarray


def point_to_point(model: LogisticRegression, training: int, count: int) -> tuple[np.ndarray, Influences]:
    """Leave out every training example in turn, and add every query in turn.

    Args:
        model (`LogisticRegression`): Of the training examples, which come first, and others.
        training (`int`): How many they are.
        count (`int`): Queries: those of the others that have the highest losses.

    Returns:
        `tuple`: Row numbers of the queries, and their influences.
    """
    alone = _within(model, training)
    losses = alone.losses(alone.fit(_mean((torch.arange(len(model.labels)) < training).double())))
    queries = training + losses[training:].argsort(descending=True, stable=True)[:count]
    rows = torch.cat([torch.arange(training), queries])
    model = _within(replace(model, inputs=model.inputs[rows], labels=model.labels[rows]), len(rows))
    everyone = (torch.arange(training + count) < training).double()
    whole = model.fit(_mean(everyone))
    factor, base = model.factor(whole, _mean(everyone)), model.losses(whole)

    def changes(rows: Tensor) -> Tensor:
        """How every row's loss changes when some rows, one at a time, are left out or added: `[fits, rows]`."""
        shares = everyone.repeat(len(rows), 1)
        shares[torch.arange(len(rows)), rows] = 1 - everyone[rows]
        fitted = model.refit(whole, factor, _mean(shares))
        return torch.stack([model.losses(theta) for theta in fitted]) - base

    bar = tqdm(total=training, desc="leaving one out", unit="fit", disable=not process_state().is_main_process)
    parts = []
    for rows in torch.arange(training).split(TOGETHER):
        parts.append(changes(rows)[:, training:])
        bar.update(len(rows))
    bar.close()
    added = changes(torch.arange(training, training + count))[:, :training]
    return queries.numpy(), Influences(torch.cat(parts).T.numpy(), -added.numpy())


def _mean(counts: Tensor) -> Tensor:
    return counts / counts.sum(dim=-1, keepdim=True)


def _within(model: LogisticRegression, rows: int) -> LogisticRegression:
    """Turn inputs so that they have no more features than the first rows span: a minimum over those lies within."""
    if model.inputs.shape[1] <= rows:
        return model
    return replace(model, inputs=model.inputs @ torch.linalg.qr(model.inputs[:rows].T).Q)
