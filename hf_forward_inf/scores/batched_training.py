"""Training of many small networks at once, on a subset of the data each, with stacked parameters."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

Outcomes: TypeAlias = Callable[[dict[str, Tensor]], Tensor]
"""Maps a network's parameters to outcomes for some rows, `[rows, ...]`."""


def losses_of(network: nn.Module, inputs: Tensor, labels: Tensor) -> Outcomes:
    """Return a function from parameters to each row's loss, `[rows]`."""

    def losses(parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(network, parameters, (inputs,)), labels, reduction="none")

    return losses


def losses_and_answers_of(network: nn.Module, inputs: Tensor, labels: Tensor) -> Outcomes:
    """Return a function from parameters to each row's loss, and 1 if its label is predicted, else 0, `[rows, 2]`."""

    def outcomes(parameters: dict[str, Tensor]) -> Tensor:
        logits = functional_call(network, parameters, (inputs,))
        losses = F.cross_entropy(logits, labels, reduction="none")
        return torch.stack([losses, (logits.argmax(dim=1) == labels).to(losses.dtype)], dim=1)

    return outcomes


@dataclass(frozen=True)
class BatchedTraining:
    """Trains many small networks at once, with stacked parameters.

    Args:
        network (`Callable`): Returns the untrained network, which maps `[rows, ...]` to logits `[rows, classes]`.
        data (`tuple`): Inputs `[candidates, ...]` and labels `[candidates]`.
        queries (`tuple`): Inputs and labels of the queries.
        steps (`int`, defaults to 400): Number of training steps.
        learning_rate (`float`, defaults to 1e-2): Initial learning rate, which falls to 0 along a cosine.
        weight_decay (`float`, defaults to 1e-3): Added to the loss as weight_decay / 2 x squared norm.
        momentum (`float`, *optional*): Momentum of SGD. Defaults to Adam.
        batch_size (`int`, *optional*): Rows in a step, in an order drawn by the seed. Defaults to the whole subset.
        outcomes (`Callable`, defaults to [`losses_of`]): Outcomes for the queries, or [`losses_and_answers_of`].
    """

    network: Callable[[], nn.Module]
    data: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]
    steps: int = 400
    learning_rate: float = 1e-2
    weight_decay: float = 1e-3
    momentum: float | None = None
    batch_size: int | None = None
    outcomes: Callable[[nn.Module, Tensor, Tensor], Outcomes] = losses_of

    @property
    def settings(self) -> tuple[float | None, ...]:
        """Everything that training depends on except network and data."""
        return self.steps, self.learning_rate, self.weight_decay, self.momentum, self.batch_size

    def __call__(self, subsets: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Train on subsets of equal size, and return outcomes for the queries, float32 `[models, queries, ...]`."""
        base, parameters = self.trained(subsets, seeds)
        with torch.no_grad():
            found = vmap(self.outcomes(base, *self.queries))(parameters)
        return found.numpy()

    def model(self, seed: int, subset: np.ndarray | None = None) -> nn.Module:
        """Return one trained network, on all of the data by default, or on a subset."""
        everyone = np.ones(len(self.data[0]), dtype=bool)
        base, parameters = self.trained((everyone if subset is None else subset)[None], np.array([seed]))
        base.load_state_dict({name: value[0] for name, value in parameters.items()})
        return base.eval()

    def trained(self, subsets: np.ndarray, seeds: np.ndarray) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the network, and the trained parameters of all models, stacked."""
        networks = [self._untrained(seed) for seed in seeds.tolist()]
        parameters, buffers = stack_module_state(networks)
        if buffers:
            raise ValueError(
                f"{type(networks[0]).__name__} has buffers ({', '.join(buffers)}), which are not trained."
            )
        rows = torch.from_numpy(np.stack([np.flatnonzero(subset) for subset in subsets]))

        def loss(one: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(networks[0], one, (x,)), y)

        optimizer = self._optimizer(parameters.values())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for inputs, labels in self._batches(rows, seeds):
            optimizer.zero_grad()
            vmap(loss)(parameters, inputs, labels).sum().backward()
            optimizer.step()
            schedule.step()
        return networks[0], {name: value.detach() for name, value in parameters.items()}

    def _optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        if self.momentum is None:
            return torch.optim.Adam(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def _batches(self, rows: Tensor, seeds: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each step's inputs, `[models, batch, ...]`, and labels, from the models' rows, `[models, rows]`."""
        if self.batch_size is None:
            yield from repeat((self.data[0][rows], self.data[1][rows]), self.steps)
            return
        draws = [np.random.default_rng(seed) for seed in seeds.tolist()]
        order = torch.empty(len(rows), 0, dtype=torch.long)
        for _ in range(self.steps):
            if order.shape[1] < min(self.batch_size, rows.shape[1]):  # an epoch ends: an incomplete batch is dropped
                order = torch.from_numpy(np.stack([draw.permutation(rows.shape[1]) for draw in draws]))
            batch, order = rows.gather(1, order[:, : self.batch_size]), order[:, self.batch_size :]
            yield self.data[0][batch], self.data[1][batch]

    def _untrained(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.network()
