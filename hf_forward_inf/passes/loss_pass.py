"""Step 3 of Algorithm 1: the loss of every candidate, by forward passes only."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_forward_inf.adapters.base import Batch, Forward, Rows
from hf_forward_inf.ascent.parameters import Parameters, call
from hf_forward_inf.ascent.steps import PerturbedModels
from hf_forward_inf.passes.candidate_pass import CandidatePass
from hf_forward_inf.passes.shared_states import SharedStates


class LossPass(CandidatePass):
    """Computes the loss of every candidate under perturbed models; base losses are computed once and cached."""

    kind = ""
    """Part of the cache key: separates what subclasses compute from plain losses."""
    states: SharedStates | None = None
    """Where batches begin from stored states, once it is set."""
    has_base = True
    """Whether what is measured under theta itself takes a pass."""
    _base: np.ndarray | None = None

    def base(self) -> np.ndarray:
        """Compute the base loss of every candidate, L(theta, D_i), summed over its terms; float32 `[candidates]`."""
        if self._base is None:
            self._base = self.plain()
        return self._base

    def plain(self) -> np.ndarray:
        """Run a plain forward pass over the candidates: their base losses, which are not kept in memory."""
        return self.run(lambda batch: self._losses(batch, [{}]), 1, "base", "base losses", self._collate)[0]

    @property
    def _collate(self) -> Callable[[Rows], Batch] | None:
        return None if self.states is None else self.states.batch

    def __call__(self, perturbed: PerturbedModels, title: str = "losses") -> np.ndarray:
        """Compute every candidate's loss under each perturbed model, L(theta_K, D_i).

        Where nothing is stored, the first call computes base losses as well: what no query changes runs once for all.

        Args:
            perturbed (`PerturbedModels`): The models of a block of queries.
            title (`str`, defaults to `"losses"`): Title of the progress bar.

        Returns:
            `np.ndarray`: float32 `[queries, candidates]`, NaN for a query that cannot move the model.
        """
        with_base = self.has_base and self._base is None and self.folder() is None
        if not with_base:
            self.base()  # first: its rows are compared before what is stored is trusted

        def work(batch: Batch) -> np.ndarray:
            return self._losses(batch, [{}, *perturbed.thetas] if with_base else perturbed.thetas)

        columns = len(perturbed) + with_base
        found = self.run(work, columns, self.kind + perturbed.fingerprint, title, self._collate)
        if with_base:
            self._base, found = found[0], found[1:]
        return found

    @torch.no_grad()
    def _losses(self, batch: Batch, thetas: Sequence[Parameters | None]) -> np.ndarray:
        """Compute the losses of a batch under each model, `[rows, models]`."""
        adapter = self.adapter
        rows = len(next(tensor for tensor in batch.values() if isinstance(tensor, Tensor)))
        losses = np.full((rows, len(thetas)), np.nan, dtype=np.float32)
        if self.states is None:  # no query changes the shared part: computed once for all models
            batch = adapter.with_shared(batch, set().union(*(theta for theta in thetas if theta is not None)))
        measure = self.measure(batch)
        for i, theta in enumerate(thetas):
            if theta is not None:
                losses[:, i] = measure(theta).float().cpu().numpy()
        return losses

    def measure(self, batch: Batch) -> Callable[[Parameters], Tensor]:
        """Return a function from a model's parameters to the batch's losses under it, `[rows]`."""
        return lambda theta: self.adapter.loss(partial(call, self.adapter.model, theta), batch)


class ChangePass(LossPass):
    """Computes how far each candidate has moved from where it is under theta, in place of its loss."""

    has_base = False

    def base(self) -> np.ndarray:
        """Return zeros, `[candidates]`: nothing has moved under theta itself."""
        return np.zeros(len(self.order), dtype=np.float32)

    def measure(self, batch: Batch) -> Callable[[Parameters], Tensor]:
        """Return a function from a model's parameters to how far the batch has moved under it, `[rows]`."""

        def seen(theta: Parameters) -> Tensor:
            return self.seen(partial(call, self.adapter.model, theta), batch)

        before = seen({})
        return lambda theta: self.moved(seen(theta) - before)

    @abstractmethod
    def seen(self, forward: Forward, batch: Batch) -> Tensor:
        """Return what moves, `[rows, ...]`."""

    @abstractmethod
    def moved(self, change: Tensor) -> Tensor:
        """Return how far a change of that is, `[rows]`."""


class ShiftPass(ChangePass):
    """Computes the distance of each candidate's outputs from those under theta."""

    kind = "shift"

    def seen(self, forward: Forward, batch: Batch) -> Tensor:
        """Return the outputs, `[rows, numbers]`."""
        return self.adapter.outputs(forward, batch)

    def moved(self, change: Tensor) -> Tensor:
        """Return the norm, `[rows]`."""
        return change.norm(dim=1)


class WeighedPass(ChangePass):
    """Computes by how much each candidate's loss has risen, where terms whose losses fall count less.

    Args:
        falls (`float`): Weight of the terms whose losses fall.
        *args, **options: Of [`CandidatePass`].
    """

    def __init__(self, *args: Any, falls: float, **options: Any):
        super().__init__(*args, **options)
        self.falls, self.kind = falls, f"falls {falls:g}"

    def seen(self, forward: Forward, batch: Batch) -> Tensor:
        """Return the losses of all terms, `[rows, terms]`."""
        return self.adapter.term_losses(forward, batch)

    def moved(self, change: Tensor) -> Tensor:
        """Return the weighed sum, `[rows]`."""
        return weighed(change, self.falls).sum(dim=1)


def weighed(change: Tensor, falls: float) -> Tensor:
    """Return changes of losses, of which those below 0 are multiplied by `falls`."""
    return torch.where(change < 0, falls * change, change)
