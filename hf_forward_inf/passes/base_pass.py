"""One pass over all candidates under the model itself: their losses, and hidden states to screen them by."""

from functools import cached_property

import numpy as np
import torch

from hf_forward_inf.adapters.base import Adapter, Batch
from hf_forward_inf.passes.candidate_pass import CandidatePass
from hf_forward_inf.passes.shared_states import SharedStates
from hf_forward_inf.utils.models import evaluating, to_device

KEY, HIDDEN = "base losses and hidden states", "hidden states"


def is_joint(adapter: Adapter) -> bool:
    """Return whether one run of an adapter's model gives losses and hidden states."""
    return type(adapter).loss_and_representation is not Adapter.loss_and_representation


class BasePass:
    """Losses and hidden states of all candidates, cached: of language models from one run of the model.

    Args:
        run (`CandidatePass`): The candidates.
        states (`SharedStates`, *optional*): Stores the states that later passes begin with.
    """

    def __init__(self, run: CandidatePass, states: SharedStates | None = None):
        self.run, self.states = run, states
        self.joint = is_joint(run.adapter)

    @property
    def losses(self) -> np.ndarray:
        """L(theta, D_i), float32 `[candidates]`."""
        if not self.joint:
            raise NotImplementedError(f"{type(self.run.adapter).__name__} has no losses and hidden states of one run.")
        return self._figures[0]

    @property
    def hidden(self) -> np.ndarray:
        """[`Adapter.representation`], float32 `[features, candidates]`."""
        return self._figures[1:] if self.joint else self._figures

    @cached_property
    def _figures(self) -> np.ndarray:
        adapter, key = self.run.adapter, KEY if self.joint else HIDDEN
        collate = None if self.states is None else self.states.batch
        with evaluating(adapter.model):
            first = self._values(to_device(adapter.collate(self.run.encoded[:1]), adapter.model))
            return self.run.run(self._values, first.shape[1], key, key, collate)

    @torch.no_grad()
    def _values(self, batch: Batch) -> np.ndarray:
        if not self.joint:
            return self.run.adapter.representation(batch).float().cpu().numpy()
        losses, hidden = self.run.adapter.loss_and_representation(batch)
        return torch.cat([losses[:, None].float(), hidden.float()], dim=1).cpu().numpy()
