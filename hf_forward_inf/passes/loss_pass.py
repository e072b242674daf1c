"""Step 3 of the algorithm: the loss of every candidate, by forward passes only."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hf_forward_inf.adapters.base import Batch
from hf_forward_inf.ascent.parameters import Parameters, call
from hf_forward_inf.ascent.steps import PerturbedModels
from hf_forward_inf.passes.candidate_pass import CandidatePass


class LossPass(CandidatePass):
    """Gives the loss of every candidate under perturbed models; base losses are computed once and cached."""

    kind = ""
    """Tells what is computed from losses, in the cache."""

    def base(self) -> np.ndarray:
        """Compute the base loss of every candidate, L(theta, D_i), summed over its terms: float32 `[candidates]`."""
        return self.run(lambda batch: self._losses(batch, [{}]), 1, "base", "base losses")[0]

    def __call__(self, perturbed: PerturbedModels, title: str = "loss pass") -> np.ndarray:
        """Compute every candidate's loss under each perturbed model, L(theta_K, D_i).

        Args:
            perturbed (`PerturbedModels`): A block of queries' models.
            title (`str`): Heads the progress bar.

        Returns:
            `np.ndarray`: float32 `[queries, candidates]`, NaN for a query that cannot move the model.
        """

        def work(batch: Batch) -> np.ndarray:
            return self._losses(batch, perturbed.thetas)

        return self.run(work, len(perturbed), self.kind + perturbed.fingerprint, title)

    @torch.no_grad()
    def _losses(self, batch: Batch, thetas: Sequence[Parameters | None]) -> np.ndarray:
        """Losses of a batch under each model: `[rows, models]`."""
        adapter = self.adapter
        rows = len(next(tensor for tensor in batch.values() if isinstance(tensor, Tensor)))
        losses = np.full((rows, len(thetas)), np.nan, dtype=np.float32)
        touched = set().union(*(theta for theta in thetas if theta is not None))
        if not touched & adapter.shared_parameters():
            batch = adapter.run_shared(batch)  # what no query touches is computed once for all of them
        measured = self._measured(batch)
        for i, theta in enumerate(thetas):
            if theta is not None:
                losses[:, i] = measured(theta).float().cpu().numpy()
        return losses

    def _measured(self, batch: Batch) -> Callable[[Parameters], Tensor]:
        """What is measured of a batch under a model: `[rows]`."""
        return lambda theta: self.adapter.loss(partial(call, self.adapter.model, theta), batch)


class ShiftPass(LossPass):
    """Gives how far each candidate's prediction is from what it was, in place of its loss: 0 under theta itself."""

    kind = "shift"

    def base(self) -> np.ndarray:
        """Zeros, `[candidates]`."""
        return np.zeros(len(self.order), dtype=np.float32)

    def _measured(self, batch: Batch) -> Callable[[Parameters], Tensor]:
        def outputs(theta: Parameters) -> Tensor:
            return self.adapter.outputs(partial(call, self.adapter.model, theta), batch)

        before = outputs({})
        return lambda theta: (outputs(theta) - before).norm(dim=1)
