"""Training anew without some of the data: the truth that attributions are judged by."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from tqdm.auto import tqdm

from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.storage import cached_tensors, default_cache_dir

Train: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Given subsets of the candidates, booleans `[models, candidates]`, and a seed for each model, trains a model on each
and gives what comes out for the queries: their losses, float32 `[models, queries]`, or several figures of each."""
Outcomes: TypeAlias = Callable[[dict[str, Tensor]], Tensor]
"""From a network's parameters to what comes out for some rows, `[rows, ...]`."""


@dataclass(frozen=True)
class Retrained:
    """What training on subsets of the candidates did to some queries.

    Args:
        queries (`datasets.Dataset`): The queries.
        subsets (`np.ndarray`): Booleans, `[subsets, candidates]`: who was in.
        losses (`np.ndarray`): `[subsets, queries]`, best averaged over several seeds of the training.

    Raises:
        ValueError: If the shapes don't fit together.
    """

    queries: Dataset
    subsets: np.ndarray
    losses: np.ndarray

    def __post_init__(self) -> None:
        if self.losses.shape != (len(self.subsets), len(self.queries)):
            raise ValueError(
                f"losses have shape {self.losses.shape}; {len(self.subsets)} subsets and {len(self.queries)} queries "
                f"ask for {(len(self.subsets), len(self.queries))}."
            )


def random_halves(candidates: int, subsets: int, seed: int = 0) -> np.ndarray:
    """Draw subsets of half the candidates, booleans `[subsets, candidates]`."""
    draw = np.random.default_rng(seed)
    return np.stack([draw.permutation(candidates) < candidates // 2 for _ in range(subsets)])


def retrained_outcomes(
    train: Train,
    subsets: np.ndarray,
    *,
    key: str,
    seeds: int = 1,
    together: int = 40,
    cache_dir: Path | None = None,
) -> np.ndarray:
    """Train a model on every subset with every seed, and give what comes out for the queries.

    Every few models are kept as soon as they are trained: a run that was interrupted goes on with the next.

    Args:
        train (`Callable`): Trains some models, all subsets of one size.
        subsets (`np.ndarray`): Booleans, `[subsets, candidates]`.
        key (`str`): Names everything that `train` depends on: data, network, settings, queries.
        seeds (`int`, defaults to 1): Trainings of each subset.
        together (`int`, defaults to 40): Models trained together.
        cache_dir (`Path`, *optional*): Outcomes are kept in its folder `retraining`. Defaults to
            [`storage.default_cache_dir`].

    Returns:
        `np.ndarray`: float32 `[seeds, subsets, queries]`, or with as many axes more as `train` gives.
    """
    folder = (cache_dir or default_cache_dir()) / "retraining"
    pairs = [(seed, subset) for seed in range(seeds) for subset in range(len(subsets))]
    parts = []
    bar = tqdm(total=len(pairs), desc="retraining", unit="model", disable=not process_state().is_main_process)
    for start in range(0, len(pairs), together):
        own_seeds, own = (np.array(one) for one in zip(*pairs[start : start + together], strict=True))
        name = fingerprint(key, own_seeds.tolist(), np.packbits(subsets[own]).tolist(), subsets.shape[1])

        def train_some(own: np.ndarray = own, own_seeds: np.ndarray = own_seeds) -> dict[str, Tensor]:
            return {"outcomes": torch.from_numpy(train(subsets[own], own_seeds))}

        with process_state().main_process_first():
            parts.append(cached_tensors(folder / f"{name}.safetensors", train_some)["outcomes"].numpy())
        bar.update(len(own))
    bar.close()
    found = np.concatenate(parts)
    return found.reshape(seeds, len(subsets), *found.shape[1:])


def losses_of(network: nn.Module, inputs: Tensor, labels: Tensor) -> Outcomes:
    """Give the function from parameters to each row's loss, `[rows]`."""

    def losses(parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(network, parameters, (inputs,)), labels, reduction="none")

    return losses


def losses_and_answers_of(network: nn.Module, inputs: Tensor, labels: Tensor) -> Outcomes:
    """Give that to each row's loss, and whether its label is the network's answer (1 or 0), `[rows, 2]`."""

    def outcomes(parameters: dict[str, Tensor]) -> Tensor:
        logits = functional_call(network, parameters, (inputs,))
        losses = F.cross_entropy(logits, labels, reduction="none")
        return torch.stack([losses, (logits.argmax(dim=1) == labels).to(losses.dtype)], dim=1)

    return outcomes


@dataclass(frozen=True)
class BatchedTraining:
    """Trains many small networks at once, by stacked steps for all of them.

    Args:
        network (`Callable`): Makes the untrained network: from `[rows, ...]` to logits `[rows, classes]`.
        data (`tuple`): Inputs `[candidates, ...]` and labels `[candidates]`.
        queries (`tuple`): Inputs and labels of the queries.
        steps (`int`, defaults to 400): Steps.
        learning_rate (`float`, defaults to 1e-2): Falls to 0 along a cosine, so that training ends at rest.
        weight_decay (`float`, defaults to 1e-3): A part of the loss: weight_decay / 2 x squared norm.
        momentum (`float`, *optional*): Take steps of SGD with this momentum. Defaults to steps of Adam.
        batch_size (`int`, *optional*): Rows of a step, in an order that the seed draws. Defaults to a whole subset.
        outcomes (`Callable`, *optional*): What comes out: [`losses_of`] by default, or [`losses_and_answers_of`].
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
        """What training depends on beside network and data."""
        return self.steps, self.learning_rate, self.weight_decay, self.momentum, self.batch_size

    def __call__(self, subsets: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Train on subsets of one size; give what comes out for the queries, float32 `[models, queries, ...]`."""
        base, parameters = self.trained(subsets, seeds)
        with torch.no_grad():
            found = vmap(self.outcomes(base, *self.queries))(parameters)
        return found.numpy()

    def model(self, seed: int, subset: np.ndarray | None = None) -> nn.Module:
        """Train one network as the others are, on all of the data or a subset."""
        everyone = np.ones(len(self.data[0]), dtype=bool)
        base, parameters = self.trained((everyone if subset is None else subset)[None], np.array([seed]))
        base.load_state_dict({name: value[0] for name, value in parameters.items()})
        return base.eval()

    def trained(self, subsets: np.ndarray, seeds: np.ndarray) -> tuple[nn.Module, dict[str, Tensor]]:
        """Give the network, and the trained parameters of all models, stacked."""
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
        """Give every step's inputs, `[models, batch, ...]`, and labels, of each model's own rows, `[models, rows]`."""
        if self.batch_size is None:
            yield from repeat((self.data[0][rows], self.data[1][rows]), self.steps)
            return
        draws = [np.random.default_rng(seed) for seed in seeds.tolist()]
        order = torch.empty(len(rows), 0, dtype=torch.long)
        for _ in range(self.steps):
            if order.shape[1] < min(self.batch_size, rows.shape[1]):  # an epoch is over: what is left is dropped
                order = torch.from_numpy(np.stack([draw.permutation(rows.shape[1]) for draw in draws]))
            batch, order = rows.gather(1, order[:, : self.batch_size]), order[:, self.batch_size :]
            yield self.data[0][batch], self.data[1][batch]

    def _untrained(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.network()
