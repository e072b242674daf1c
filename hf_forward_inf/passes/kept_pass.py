"""Step 3 of Algorithm 1 for some candidates of each query: those that a screen has kept."""

from collections.abc import Set

import numpy as np
import torch
from datasets import is_caching_enabled

from hf_forward_inf.adapters.agreement import parts_agree
from hf_forward_inf.adapters.base import Batch, Rows
from hf_forward_inf.ascent.parameters import Parameters
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.passes.row_store import RowStore
from hf_forward_inf.passes.state_store import StateStore, padded
from hf_forward_inf.utils.fingerprints import fingerprint

PLACE = "_place"
"""Feature that says where a candidate is among the sorted ones."""


class KeptPass:
    """Computes losses of chosen candidates under one perturbed model after another.

    Losses are cached by model and row ([`RowStore`]): what was computed for another choice of candidates is not
    computed again. The states before the perturbed part are stored as they are computed, and later queries start
    there.

    Args:
        loss (`LossPass`): All candidates, and what is measured of them.
        names (`set[str]`): The parameters that are perturbed.
        storage (`float`): Bytes that states may take: in the cache folder or, without a cache, in memory.
    """

    def __init__(self, loss: LossPass, names: Set[str], storage: float):
        self.loss, self.names = loss, names
        self.place = np.argsort(loss.order)  # of each candidate among the sorted ones
        self.states = self._state_store(storage)

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
            features = {**self.loss.encoded[places.tolist()], PLACE: places.tolist()}
            losses = self.loss._values(lambda batch: self._measured(batch, theta), features, self._batch)
        with self._store(key).writing() as add:
            add(self.loss.order[places], losses)
        return losses[np.searchsorted(places, self.place[rows]), 0]

    def _store(self, key: str) -> RowStore:
        return RowStore(self.loss._folder(self.loss.kind + key), len(self.place), 1)

    @torch.no_grad()
    def _measured(self, batch: Batch, theta: Parameters) -> np.ndarray:
        return self.loss._measure(batch)(theta).float().cpu().numpy()[:, None]

    @torch.no_grad()
    def _batch(self, features: Rows) -> Batch:
        """Collate some candidates, and run them up to the perturbed part unless their states are stored."""
        places, features = features[PLACE], {name: values for name, values in features.items() if name != PLACE}
        batch = self.loss.collated(features)
        if self.states is None:
            return self.loss.adapter.with_shared(batch, self.names)
        states = [self.states.read(place) for place in places]
        missing = [i for i, one in enumerate(states) if one is None]
        if missing:
            fewer = {name: [values[i] for i in missing] for name, values in features.items()}
            for i, one in zip(missing, self._shared(self.loss.collated(fewer)), strict=True):
                own = states[i] = one[: self.states.lengths[places[i]]]
                self.states.write(places[i], own)
        device = next(value.device for value in batch.values() if isinstance(value, torch.Tensor))
        return self.loss.adapter.with_states(batch, padded([one.to(device) for one in states if one is not None]))

    def _shared(self, batch: Batch) -> torch.Tensor:
        adapter = self.loss.adapter
        return adapter.shared_states(adapter.with_shared(batch, self.names))

    def _state_store(self, storage: float) -> StateStore | None:
        """Return where states are stored; `None` if nothing is shared, or states can't be put back."""
        loss, adapter = self.loss, self.loss.adapter
        lengths, shared = adapter.shared_lengths(loss.lengths), adapter.shared_parameters()
        if lengths is None or not storage or not shared or shared & self.names:
            return None
        first = loss.collated(loss.encoded[:1])
        halves = adapter.with_shared(first, self.names)
        if not adapter.shares or not parts_agree(
            adapter.model,
            whole=lambda: adapter.term_losses(adapter.model, first),
            parts=lambda: adapter.term_losses(
                adapter.model, adapter.with_states(first, adapter.shared_states(halves)[:, : lengths[0]])
            ),
        ):
            return None
        folder = loss._folder(fingerprint("states", loss.state.process_index))
        file = folder.with_suffix(".bin") if loss.cached and is_caching_enabled() and folder else None
        return StateStore(file, lengths, adapter.shared_states(halves), storage / loss.state.num_processes)
