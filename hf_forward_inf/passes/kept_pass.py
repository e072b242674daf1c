"""Step 3 of Algorithm 1 for some candidates of each query: those that a screen has kept."""

import numpy as np
import torch

from hf_forward_inf.adapters.base import Batch
from hf_forward_inf.ascent.parameters import Parameters
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.passes.row_store import RowStore
from hf_forward_inf.passes.shared_states import SharedStates


class KeptPass:
    """Computes losses of chosen candidates under one perturbed model after another.

    Losses are cached by model and row ([`RowStore`]): what was computed for another choice of candidates is not
    computed again.

    Args:
        loss (`LossPass`): All candidates, and what is measured of them.
        states (`SharedStates`): Makes their batches.
    """

    def __init__(self, loss: LossPass, states: SharedStates):
        self.loss, self.states = loss, states
        self.place = np.argsort(loss.order)  # of each candidate among the sorted ones

    def known(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return what is cached of a perturbed model: losses, and of which candidates, both `[candidates]`.

        Args:
            key (`str`): The perturbed model's fingerprint.
        """
        losses, stored = self._store(key).load()
        return losses[:, 0], stored

    def run(self, theta: Parameters | None, key: str, rows: np.ndarray) -> np.ndarray:
        """Compute the losses of some candidates under a perturbed model, and cache them.

        Args:
            theta (`dict`, *optional*): theta_K; losses under `None` are NaN.
            key (`str`): The perturbed model's fingerprint.
            rows (`np.ndarray`): The candidates' row numbers.

        Returns:
            `np.ndarray`: float32 `[rows]`.
        """
        places = np.sort(self.place[rows])
        if theta is None:
            losses = np.full((len(places), 1), np.nan, dtype=np.float32)
        else:
            features = self.loss.features(places)
            losses = self.loss.values(lambda batch: self._measured(batch, theta), features, self.states.batch)
        with self._store(key).writing() as add:
            add(self.loss.order[places], losses)
        return losses[np.searchsorted(places, self.place[rows]), 0]

    def _store(self, key: str) -> RowStore:
        return RowStore(self.loss.folder(self.loss.kind + key), len(self.place), 1)

    @torch.no_grad()
    def _measured(self, batch: Batch, theta: Parameters) -> np.ndarray:
        return self.loss.measure(batch)(theta).float().cpu().numpy()[:, None]
