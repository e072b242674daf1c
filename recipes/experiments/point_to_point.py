"""The hypothesis for noiseless training: single examples and queries, logistic regression (section 2.1)."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hf_forward_inf.utils.processes import process_state

ITERATIONS = 1000
"""Largest number of L-BFGS steps, as in the paper."""
TOLERANCE = 1e-10
"""Largest gradient entry at the end of a fit; one example's influence is at least a thousand times larger."""
NEARBY = 100
"""Newton steps with the Hessian of a nearby minimum, after which that minimum is given up as too far away."""
TOGETHER = 100
"""Fits in a batch."""


@dataclass(frozen=True)
class LogisticRegression:
    """Mean cross-entropy plus l2 / 2 x squared norm: strictly convex, so it has a single minimum.

    Args:
        inputs (`Tensor`): float64 `[rows, features]`; a constant feature is the bias.
        labels (`Tensor`): Integers from 0, `[rows]`.
        classes (`int`): Number of classes.
        l2 (`float`, defaults to 1e-3): Weight of the penalty, as in the paper.
    """

    inputs: Tensor
    labels: Tensor
    classes: int
    l2: float = 1e-3

    def fit(self, shares: Tensor) -> Tensor:
        """Return the minimum by L-BFGS from 0.

        Args:
            shares (`Tensor`): float64 `[rows]`, weights of the rows in the mean; 0 for rows that are left out.

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
        # Near differences of 1e-16 in the objective a line search fails; Newton steps need only gradients.
        (theta,), reached = self._descended(theta[None], self.factor(theta, shares), shares[None])
        if not reached.all():
            raise FloatingPointError("The logistic regression does not converge: raise l2.")
        return theta

    def factor(self, theta: Tensor, shares: Tensor) -> Tensor:
        """Return the Cholesky factor of the objective's Hessian, `[features x classes, features x classes]`."""
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
        """Return the minima for several weightings of the rows, from a nearby minimum and with its Hessian.

        Args:
            start (`Tensor`): The nearby minimum, `[features, classes]`.
            factor (`Tensor`): Cholesky factor of its Hessian, from [`factor`].
            shares (`Tensor`): Weights of the rows, `[fits, rows]`.

        Returns:
            `Tensor`: `[fits, features, classes]`.
        """
        theta, reached = self._descended(start.repeat(len(shares), 1, 1), factor, shares)
        for fit in (~reached).nonzero().flatten().tolist():  # too far away for this Hessian
            theta[fit] = self.fit(shares[fit])
        return theta

    def _descended(self, theta: Tensor, factor: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Take Newton steps with one Hessian for all fits; return them, and which have reached their minimum."""
        for _ in range(NEARBY):
            slopes = self._slopes(theta, shares)
            reached = slopes.abs().amax(dim=(1, 2)) < TOLERANCE
            if reached.all():
                break
            theta = theta - torch.cholesky_solve(slopes.flatten(1).T, factor).T.view_as(theta)
        return theta, reached

    def losses(self, theta: Tensor) -> Tensor:
        """Return the loss of every row, `[rows]`."""
        return F.cross_entropy(self.inputs @ theta, self.labels, reduction="none")

    def _slopes(self, theta: Tensor, shares: Tensor) -> Tensor:
        errors = (self.inputs @ theta).softmax(dim=2) - F.one_hot(self.labels, self.classes)
        return self.inputs.T @ (shares[..., None] * errors) + self.l2 * theta


@dataclass(frozen=True)
class Influences:
    """Influences in both directions; higher means a stronger proponent, so both are minus the paper's.

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
        model (`LogisticRegression`): Its rows are the training examples, followed by others.
        training (`int`): Number of training examples.
        count (`int`): Number of queries, the other rows with the highest losses.

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
        """Return the change of every row's loss as each of `rows` is left out or added, `[fits, rows]`."""
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
    """Project inputs onto the span of the first rows, which contains the minimum over these rows."""
    if model.inputs.shape[1] <= rows:
        return model
    return replace(model, inputs=model.inputs @ torch.linalg.qr(model.inputs[:rows].T).Q)
