"""Batches of candidates, run up to the perturbed part of the model: from stored states, where there are any."""

from collections.abc import Set

import torch

from hf_forward_inf.adapters.agreement import parts_agree
from hf_forward_inf.adapters.base import Batch, Rows
from hf_forward_inf.passes.candidate_pass import PLACE, CandidatePass
from hf_forward_inf.passes.state_store import StateStore, padded
from hf_forward_inf.utils.models import bytes_of_model

IN_MEMORY = 64 * 2**20
"""Bytes of states that are held in memory where nothing is cached, or a tenth of the model if that is more."""


class SharedStates:
    """Collates candidates, and runs the part of the model that no query changes, once for each candidate.

    Args:
        run (`CandidatePass`): All candidates.
        names (`set[str]`): The parameters that are perturbed.
        storage (`float`): Bytes that states may take: in the cache folder or, without a cache, in memory.
    """

    def __init__(self, run: CandidatePass, names: Set[str], storage: float):
        self.run, self.adapter, self.names = run, run.adapter, names
        self.others: list[StateStore] = []
        self.store = self._store(storage)

    @torch.no_grad()
    def batch(self, features: Rows) -> Batch:
        """Return candidates as a batch on the model's device, run up to the perturbed part.

        Args:
            features (`dict[str, list]`): Encoded candidates, with their places ([`candidate_pass.PLACE`]).
        """
        places = features[PLACE]
        batch = self.run.collated(features)
        if self.store is None:
            return self.adapter.with_shared(batch, self.names)
        states = [self._read(place) for place in places]
        missing = [i for i, one in enumerate(states) if one is None]
        if missing:
            fewer = {name: [values[i] for i in missing] for name, values in features.items()}
            computed = self._states(batch if len(missing) == len(places) else self.run.collated(fewer))
            for i, one in zip(missing, computed, strict=True):
                own = states[i] = one[: self.store.lengths[places[i]]]
                self.store.write(places[i], own)
        device = next(value.device for value in batch.values() if isinstance(value, torch.Tensor))
        return self.adapter.with_states(batch, padded([one.to(device) for one in states if one is not None]))

    def _read(self, place: int) -> torch.Tensor | None:
        """Return stored states, whichever process has computed them."""
        assert self.store is not None
        found = (store.read(place) for store in (self.store, *self.others))
        return next((states for states in found if states is not None), None)

    def _states(self, batch: Batch) -> torch.Tensor:
        return self.adapter.shared_states(self.adapter.with_shared(batch, self.names))

    def _store(self, storage: float) -> StateStore | None:
        """Return where states are stored; `None` if nothing is shared, or states can't be put back."""
        run, adapter = self.run, self.adapter
        lengths, shared = adapter.shared_lengths(run.lengths), adapter.shared_parameters()
        if lengths is None or not storage or not shared or shared & self.names:
            return None
        with torch.no_grad():
            first = run.collated(run.encoded[:1])
            halves = adapter.with_shared(first, self.names)
        if not adapter.shares or not self._can_be_put_back(first, halves, int(lengths[0])):
            return None
        like, limit = adapter.shared_states(halves), storage / run.state.num_processes
        folder = run.folder("states")
        if folder is None:  # memory is to stay that of inference
            return StateStore(None, lengths, like, min(limit, max(IN_MEMORY, bytes_of_model(adapter.model) / 10)))
        files = [folder / f"{process}.bin" for process in range(run.state.num_processes)]
        own = files[run.state.process_index]
        self.others = [StateStore(file, lengths, like, 0) for file in {*files, *folder.glob("*.bin")} - {own}]
        return StateStore(own, lengths, like, limit)

    def _can_be_put_back(self, first: Batch, halves: Batch, length: int) -> bool:
        adapter = self.adapter
        return parts_agree(
            adapter.model,
            whole=lambda: adapter.term_losses(adapter.model, first),
            parts=lambda: adapter.term_losses(
                adapter.model, adapter.with_states(first, adapter.shared_states(halves)[:, :length])
            ),
        )
