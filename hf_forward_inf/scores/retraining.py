"""Retraining on subsets of the data: the ground truth that attributions are evaluated with."""

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

from hf_forward_inf.scores.metrics import best_first
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.storage import cached_tensors, default_cache_dir

Train: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Trains a model on each subset of the candidates, booleans `[models, candidates]`, with a seed for each model, and
returns outcomes for the queries: their losses, float32 `[models, queries]`, or several values for each."""
Outcomes: TypeAlias = Callable[[dict[str, Tensor]], Tensor]
"""Maps a network's parameters to outcomes for some rows, `[rows, ...]`."""


@dataclass(frozen=True)
class Retrained:
    """Losses of some queries after training on subsets of the candidates.

    Args:
        queries (`datasets.Dataset`): The queries.
        subsets (`np.ndarray`): Booleans, `[subsets, candidates]`: which candidates are in each subset.
        losses (`np.ndarray`): Losses, `[subsets, queries]`, preferably averaged over several training seeds.

    Raises:
        ValueError: If the shapes don't match.
    """

    queries: Dataset
    subsets: np.ndarray
    losses: np.ndarray

    def __post_init__(self) -> None:
        if self.losses.shape != (len(self.subsets), len(self.queries)):
            raise ValueError(
                f"losses have shape {self.losses.shape}, but {len(self.subsets)} subsets and {len(self.queries)} "
                f"queries need {(len(self.subsets), len(self.queries))}."
            )


def random_subsets(candidates: int, subsets: int, drop: float = 0.5, seed: int = 0) -> np.ndarray:
    """Draw subsets of the candidates, all of the same size, booleans `[subsets, candidates]`.

    Args:
        candidates (`int`): Number of candidates.
        subsets (`int`): Number of subsets.
        drop (`float`, defaults to 0.5): Share of the candidates that a subset lacks, above 0 and below 1.
        seed (`int`, defaults to 0): Seed of the draw.

    Raises:
        ValueError: If nothing would be dropped, or everything.
    """
    kept = candidates - round(drop * candidates)
    if not 0 < kept < candidates:
        raise ValueError(f"drop={drop} leaves {kept} of {candidates} candidates: give a share that leaves some out.")
    draw = np.random.default_rng(seed)
    return np.stack([draw.permutation(candidates) < kept for _ in range(subsets)])


def all_but_one(candidates: int, rows: Iterable[int]) -> np.ndarray:
    """Return subsets that lack one candidate each, booleans `[rows, candidates]`.

    The [`metrics.lds`] on them is the leave-one-out correlation: the Spearman correlation of the rows' scores and of
    how much a query's loss rises without them.

    Args:
        candidates (`int`): Number of candidates.
        rows (`Iterable[int]`): The candidates that are left out.
    """
    rows = list(rows)
    subsets = np.ones((len(rows), candidates), dtype=bool)
    subsets[np.arange(len(rows)), rows] = False
    return subsets


def without_best(scores: np.ndarray, count: int) -> np.ndarray:
    """Return for each query all candidates but those that score highest, booleans `[queries, candidates]`.

    Args:
        scores (`np.ndarray`): Scores, `[queries, candidates]`; equal scores rank in row order, NaN last.
        count (`int`): Number of candidates that are left out.
    """
    kept = np.ones(scores.shape, dtype=bool)
    np.put_along_axis(kept, best_first(scores)[:, :count], False, axis=1)
    return kept


def rises_without_best(trained: Callable[[np.ndarray], np.ndarray], scores: np.ndarray, count: int) -> np.ndarray:
    """Return how much each query's loss rises if its best candidates are removed and a model is trained again (QLD).

    Every query needs a training of its own, and all of them one with all candidates.

    Args:
        trained (`Callable`): Trains on subsets, booleans `[subsets, candidates]`, and returns the queries' losses,
            `[subsets, queries]`.
        scores (`np.ndarray`): Scores, `[queries, candidates]`.
        count (`int`): Number of candidates that are removed for a query.

    Returns:
        `np.ndarray`: Rises of the loss, `[queries]`.
    """
    own = np.arange(len(scores))
    whole = trained(np.ones((1, scores.shape[1]), dtype=bool))[0]
    return trained(without_best(scores, count))[own, own] - whole


def retrained_outcomes(
    train: Train,
    subsets: np.ndarray,
    *,
    key: str,
    seeds: int = 1,
    together: int = 40,
    cache_dir: Path | None = None,
) -> np.ndarray:
    """Train a model on every subset with every seed, and return the outcomes for the queries.

    Outcomes are cached each time `together` models are trained, so that an interrupted run resumes.

    Args:
        train (`Callable`): Trains some models, on subsets of equal size.
        subsets (`np.ndarray`): Booleans, `[subsets, candidates]`.
        key (`str`): Identifies everything that `train` depends on: data, network, settings, queries.
        seeds (`int`, defaults to 1): Number of trainings on each subset.
        together (`int`, defaults to 40): Number of models that are trained at once.
        cache_dir (`Path`, *optional*): Outcomes are cached in its folder `retraining`. Defaults to
            [`storage.default_cache_dir`].

    Returns:
        `np.ndarray`: float32 `[seeds, subsets, queries, ...]`, with the further axes that `train` returns, if any.
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
