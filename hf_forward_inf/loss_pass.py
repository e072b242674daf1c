"""Step 3 of the algorithm: the loss of every candidate, by forward passes only."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hf_forward_inf.adapters.base import Batch
from hf_forward_inf.ascent import Parameters, Perturbation, call
from hf_forward_inf.candidate_pass import CandidatePass
from hf_forward_inf.modules import held_at_once


class LossPass(CandidatePass):
    """Gives the loss of every candidate under perturbed models; base losses are computed once and cached."""

    def base(self) -> np.ndarray:
        """Compute the base loss of every candidate, L(theta, D_i), summed over its terms: float32 `[candidates]`."""
        return self.run(lambda batch: self._losses(batch, [{}]), 1, "base", "base losses")[0]

    def __call__(self, perturbation: Perturbation, title: str = "loss pass") -> np.ndarray:
        """Compute every candidate's loss under each perturbed model, L(theta_K, D_i).

        Args:
            perturbation (`Perturbation`): A block of queries' models.
            title (`str`): Heads the progress bar.

        Returns:
            `np.ndarray`: float32 `[queries, candidates]`, NaN for a query that cannot move the model.
        """

        def work(batch: Batch) -> np.ndarray:
            return self._losses(batch, perturbation.thetas)

        return self.run(work, len(perturbation), perturbation.fingerprint, title)

    def queries_a_pass(self, names: list[str]) -> int:
        """How many perturbed models are held at once."""
        return held_at_once(self.adapter.model, names)

    @torch.no_grad()
    def _losses(self, batch: Batch, thetas: Sequence[Parameters | None]) -> np.ndarray:
        """Losses of a batch under each model: `[rows, models]`."""
        adapter, model = self.adapter, self.adapter.model
        rows = len(next(tensor for tensor in batch.values() if isinstance(tensor, Tensor)))
        losses = np.full((rows, len(thetas)), np.nan, dtype=np.float32)
        touched = set().union(*(theta for theta in thetas if theta is not None))
        if not touched & adapter.prefix_parameters():
            batch = adapter.prefix(batch)  # what no query touches is computed once for all of them
        for i, theta in enumerate(thetas):
            if theta is not None:
                losses[:, i] = adapter.loss(partial(call, model, theta), batch).float().cpu().numpy()
        return losses
