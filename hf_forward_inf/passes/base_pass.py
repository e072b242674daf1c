"""One pass over all candidates under the model itself: their losses, and hidden states to screen them by."""

from functools import cached_property

import numpy as np
import torch

from hf_forward_inf.adapters.base import Batch
from hf_forward_inf.passes.candidate_pass import CandidatePass
from hf_forward_inf.passes.shared_states import SharedStates
from hf_forward_inf.utils.models import evaluating, to_device

KEY = "base losses and hidden states"


class BasePass:
    """Losses and hidden states of all candidates, from one run of the model, cached.

    Args:
        run (`CandidatePass`): The candidates.
        states (`SharedStates`, *optional*): Stores the states that later passes begin with.
    """

    def __init__(self, run: CandidatePass, states: SharedStates | None = None):
        self.run, self.states = run, states

    @property
    def losses(self) -> np.ndarray:
        """L(theta, D_i), float32 `[candidates]`."""
        return self._figures[0]

    @property
    def hidden(self) -> np.ndarray:
        """[`Adapter.representation`], float32 `[features, candidates]`."""
        return self._figures[1:]

    @cached_property
    def _figures(self) -> np.ndarray:
        adapter, encoded = self.run.adapter, self.run.encoded

        @torch.no_grad()
        def work(batch: Batch) -> np.ndarray:
            losses, hidden = adapter.loss_and_representation(batch)
            return torch.cat([losses[:, None].float(), hidden.float()], dim=1).cpu().numpy()

        with evaluating(adapter.model):
            first = work(to_device(adapter.collate(encoded[:1]), adapter.model))
            return self.run.run(work, first.shape[1], KEY, KEY, None if self.states is None else self.states.batch)
