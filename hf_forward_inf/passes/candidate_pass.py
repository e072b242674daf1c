"""One cached pass over all candidates: encoded once, sorted, batched and distributed over the processes."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, reduce
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset, is_caching_enabled

from hf_forward_inf.adapters.base import Adapter, Batch, Rows
from hf_forward_inf.passes.encoding import encode
from hf_forward_inf.passes.freshness import agree, drawn_rows, is_first_use, tolerance_of
from hf_forward_inf.passes.row_store import RowStore
from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model, foreign_hooks
from hf_forward_inf.utils.memory import Memory
from hf_forward_inf.utils.models import is_sharded, to_device
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.progress import progress
from hf_forward_inf.utils.storage import default_cache_dir

MAX_BATCH_LENGTH = 4096
"""Default maximum of padded tokens in a batch; halved when memory runs out."""
PLACE = "_place"
"""Feature that says where a candidate is among the sorted ones."""
SLICE = 4096
"""Rows that are read at once."""
LENGTHS = Memory[np.ndarray]()
"""Lengths of the rows of the last candidates."""

Work: TypeAlias = Callable[[Batch], np.ndarray]
"""Computes float32 values, `[rows, columns]`, from a batch on the model's device."""


class CandidatePass:
    """Runs a function over every candidate, batch by batch, and returns its values in the candidates' order.

    Candidates are encoded once, sorted by length to save padding, and distributed over the processes of
    `accelerate launch`. The values of a row are stored under a fingerprint of weights, encoded candidates, settings
    and the function's own key ([`RowStore`]): an interrupted run, another batch size or another number of processes
    goes on with the rows that are missing.

    Args:
        adapter (`Adapter`): Encodes candidates and computes their losses.
        candidates (`datasets.Dataset`): Rows to score.
        cache_dir (`Path`, *optional*): Defaults to [`default_cache_dir`].
        max_batch_length (`int`, defaults to 4096): Maximum of padded tokens (of rows, where nothing is padded) in a
            batch; halved when memory runs out.
        first_row (`int`, defaults to 0): As in [`encode`].
    """

    def __init__(
        self,
        adapter: Adapter,
        candidates: Dataset,
        *,
        cache_dir: Path | None = None,
        max_batch_length: int = MAX_BATCH_LENGTH,
        first_row: int = 0,
    ):
        self.adapter = adapter
        self.cache_dir = cache_dir or default_cache_dir()
        self.max_batch_length = max_batch_length
        self.state = process_state()
        encoded = encode(adapter, candidates, "candidates", self.cache_dir, first_row=first_row)
        self.terms = np.array(encoded["terms"][:], dtype=np.float32)
        written = [Path(file["filename"]).stat().st_mtime_ns for file in encoded.cache_files]  # perhaps again
        known = fingerprint(adapter.cache_key, encoded._fingerprint, written)
        lengths = LENGTHS.get(known, lambda: _lengths(adapter, encoded))
        if not adapter.can_batch(encoded.with_format(None), lengths):
            self.max_batch_length = 1
        # Longest first: if memory runs out, it does so at the start. Ties stay in order, so that runs agree.
        self.order = np.lexsort(-lengths.T[::-1])
        self.encoded, self.lengths = encoded.select(self.order), lengths[self.order]
        self.cuts = list(batches(lengths[self.order], self.max_batch_length))
        self._of_rows = encoded._fingerprint
        hooked = foreign_hooks(adapter.model)
        self.cached = not hooked
        if hooked and self.state.is_main_process:
            warnings.warn(
                f"{hooked[0]} has a forward hook of your own{f' ({len(hooked)} modules have)' if hooked[1:] else ''}: "
                "what it does is not known, so losses are not cached.",
                stacklevel=2,
            )

    def run(
        self, work: Work, columns: int, key: str, title: str, collate: Callable[[Rows], Batch] | None = None
    ) -> np.ndarray:
        """Run one cached pass over this process's share of the rows that are not stored, and gather all values.

        Args:
            work (`Callable`): Computes float32 values, `[rows, columns]`, from a batch on the model's device.
            columns (`int`): Number of values for each candidate.
            key (`str`): Identifies everything that the values depend on besides weights, candidates and adapter.
            title (`str`): Title of the progress bar.
            collate (`Callable`, *optional*): Makes batches of encoded candidates, whose places among the sorted ones
                it is given, too ([`PLACE`]). Defaults to [`collated`].

        Returns:
            `np.ndarray`: float32 `[columns, candidates]`.
        """
        store = RowStore(self.folder(key), len(self.order), columns)
        values, stored = self._stored(store, lambda places: self.values(work, self.features(places), collate))
        # Processes share whole batches: shapes, and so every bit of a loss, are those of a single process.
        missing = [cut for cut in self.cuts if not stored[self.order[cut]].all()]
        share = missing[self.state.process_index :: self.state.num_processes]
        together = is_sharded(self.adapter.model)
        idle = -(-len(missing) // self.state.num_processes) - len(share) if together else 0
        left = sum(int((~stored[self.order[cut]]).sum()) for cut in share)
        with store.writing() as add, progress(title, left, "rows") as advance:
            for cut in share:
                places = np.arange(cut.start, cut.stop)[~stored[self.order[cut]]]
                rows = self.order[places]
                values[rows] = self.values(work, self.features(places), collate)
                add(rows, values[rows])
                advance(len(rows))
            for _ in range(idle):  # all processes run a sharded model as often
                self.values(work, self.features(np.arange(1)), collate)
        return self._gathered(values).T

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of all that values depend on besides a pass's own key."""
        return fingerprint(fingerprint_of_model(self.adapter.model), self.adapter.cache_key, self._of_rows)

    def is_cached(self, key: str) -> bool:
        """Return whether all values of a pass are stored."""
        return RowStore(self.folder(key), len(self.order), 1).is_complete()

    def folder(self, key: str = "") -> Path | None:
        """Return the folder of a pass, or of all passes over these candidates; `None` if nothing is cached."""
        if not self.cached or not is_caching_enabled():
            return None
        return self.cache_dir / "passes" / self.fingerprint / (fingerprint(key) if key else "")

    def _stored(self, store: RowStore, compute: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return the values that are stored, on the main process alone, and which rows they are, on all."""
        found = store.load() if self.state.is_main_process else store.nothing()
        if self.state.is_main_process and not self._is_current(compute, *found):
            warnings.warn(
                "Cached losses are not what the model computes now (its code, or a file that it reads, has changed), "
                "so all are computed again.",
                stacklevel=4,
            )
            shutil.rmtree(self.folder() or "", ignore_errors=True)
            found = store.nothing()
        if self.state.num_processes > 1:
            return found[0], broadcast_object_list([found[1]])[0]
        return found

    def _is_current(self, compute: Callable[[np.ndarray], np.ndarray], values: np.ndarray, stored: np.ndarray) -> bool:
        """Compute a few random rows of the adapter's first pass over these candidates again, and compare."""
        if self.folder() is None or is_sharded(self.adapter.model):
            return True
        places = np.flatnonzero(stored[self.order])
        if not is_first_use(self.adapter, self.fingerprint) or not len(places):
            return True
        places = drawn_rows(places)
        return agree(values[self.order[places]], compute(places), tolerance_of(self.adapter.model))

    def values(self, work: Work, features: Rows, collate: Callable[[Rows], Batch] | None = None) -> np.ndarray:
        """Compute the values of some rows, `[rows, columns]`, in halved batches when memory runs out."""
        collate = collate or self.collated

        def parts() -> Iterator[np.ndarray]:
            for rows in batches(self.adapter.lengths(features), self.max_batch_length):
                part = {key: values[rows] for key, values in features.items()}
                yield work(collate(part))

        while True:
            try:
                return np.concatenate(list(parts()))
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or self.max_batch_length <= 1:
                    raise
            # Not find_executable_batch_size: it collects garbage at every call, which takes longer than a batch.
            self.max_batch_length //= 2
            clear_device_cache(garbage_collection=True)

    def features(self, places: np.ndarray) -> Rows:
        """Return encoded candidates, at places among the sorted ones, with these."""
        return {**self.encoded[places.tolist()], PLACE: places.tolist()}

    def collated(self, features: Rows) -> Batch:
        """Return rows as a batch on the model's device."""
        own = {name: values for name, values in features.items() if name != PLACE}
        return to_device(self.adapter.collate(own), self.adapter.model)

    def _gathered(self, values: np.ndarray) -> np.ndarray:
        """Add up what the processes have, `[rows, columns]`: each row is 0 in all of them but one."""
        if self.state.num_processes == 1:
            return values
        bits = torch.from_numpy(values).view(torch.int32).to(self.state.device)  # floats would lose the sign of -0
        return reduce(bits, "sum").cpu().view(torch.float32).numpy()


def _lengths(adapter: Adapter, encoded: Dataset) -> np.ndarray:
    """Return the lengths of all rows, `[rows, axes]`; some thousand rows at once are read faster than one by one."""
    rows = encoded.with_format(None)
    return np.concatenate([adapter.lengths(rows[start : start + SLICE]) for start in range(0, len(rows), SLICE)])


def batches(lengths: np.ndarray, max_batch_length: int) -> Iterator[slice]:
    """Split sorted rows into batches whose padded size, rows x longest, stays within a limit.

    Args:
        lengths (`np.ndarray`): `[rows, axes]`, from `Adapter.lengths`.
        max_batch_length (`int`): The limit; a single row may exceed it.

    Yields:
        `slice`: The rows of a batch.
    """
    start = 0
    longest = np.zeros(lengths.shape[1], dtype=int)
    for i, row in enumerate(lengths):
        grown = np.maximum(longest, row)
        if i > start and (i + 1 - start) * grown.sum() > max_batch_length:
            yield slice(start, i)
            start, grown = i, row
        longest = grown
    yield slice(start, len(lengths))
