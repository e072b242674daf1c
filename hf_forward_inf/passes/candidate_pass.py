"""One pass over all candidates: encoded once, sorted, batched, shared out over processes, cached."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather, pad_across_processes
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset, Features, List, Value, is_caching_enabled

from hf_forward_inf.adapters.base import Adapter, Batch, Rows
from hf_forward_inf.adapters.contrast import query_adapter
from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model
from hf_forward_inf.utils.models import to_device
from hf_forward_inf.utils.processes import process_state, progress_bars
from hf_forward_inf.utils.storage import default_cache_dir
from hf_forward_inf.utils.validation import check_dataset, check_rows, listed

MAX_BATCH_LENGTH = 4096
"""Padded tokens in one batch to begin with; halved when memory runs out."""


REASONS = 5
"""Rows of which a message says why they can't be read."""


class CandidatePass:
    """Runs work over every candidate, batch by batch, and gives its figures back in the candidates' order.

    Candidates are encoded once, sorted by length so that padding wastes little, and shared out over the
    processes of `accelerate launch`. Each pass is one `datasets.map`, cached under a fingerprint of weights,
    encoded candidates, settings and the work's own key: a run that was interrupted goes on with the first
    pass that is not finished.

    Args:
        adapter (`Adapter`): Encodes candidates and gives their losses.
        candidates (`datasets.Dataset`): Rows to score.
        cache_dir (`Path`, *optional*): Defaults to [`default_cache_dir`].
        max_batch_length (`int`, defaults to 4096): Padded tokens (or rows, where nothing is padded) in a
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
        self.terms = np.array(encoded["terms"], dtype=np.float32)
        lengths = adapter.lengths(encoded.with_format(None))
        # Longest first: if memory runs out, it does so at once. Ties keep their order, so that runs agree.
        self.order = np.lexsort(-lengths.T[::-1])
        self.encoded = encoded.select(self.order)
        # Batches are dealt out whole: their shapes, and so every bit of a loss, are those of a single process.
        cuts = list(batches(lengths[self.order], max_batch_length))
        self.shares = [cuts[process :: self.state.num_processes] for process in range(self.state.num_processes)]
        self.weights = fingerprint_of_model(adapter.model)

    def run(self, work: Callable[[Batch], np.ndarray], columns: int, key: str, title: str) -> np.ndarray:
        """Run one cached pass over this process's share and put everyone's together.

        Args:
            work (`Callable`): Given a batch on the model's device, gives figures, float32 `[rows, columns]`.
            columns (`int`): Figures a candidate.
            key (`str`): Names everything, beside weights, candidates and adapter, that the figures depend on.
            title (`str`): Heads the progress bar.

        Returns:
            `np.ndarray`: float32 `[columns, candidates]`.
        """
        share = (self.state.process_index, self.state.num_processes)
        name = fingerprint(self.weights, self.adapter.cache_key, self.encoded._fingerprint, key, share)
        cuts = self.shares[self.state.process_index]
        local = np.empty((0, columns), dtype=np.float32)
        if cuts:
            with progress_bars(self.state.is_main_process):
                mapped = Dataset.from_dict({"start": [c.start for c in cuts], "stop": [c.stop for c in cuts]}).map(
                    self._step(work),
                    batched=True,
                    batch_size=1,
                    remove_columns=["start", "stop"],
                    features=Features({"figures": List(Value("float32"), length=columns)}),
                    cache_file_name=_cache_file(self.cache_dir, "passes", name),
                    new_fingerprint=name,
                    desc=f"{title}, batches",
                )
            local = np.asarray(mapped.with_format("numpy")["figures"][:], dtype=np.float32).reshape(-1, columns)
        figures = np.empty((columns, len(self.order)), dtype=np.float32)
        for rows, part in zip(self.shares, self._gather(local), strict=True):
            indices = np.concatenate([self.order[:0], *(self.order[cut] for cut in rows)])
            figures[:, indices] = part[: len(indices)].T
        return figures

    def _step(self, work: Callable[[Batch], np.ndarray]) -> Any:
        """Make the function that `datasets.map` calls; it halves its batches when memory runs out."""

        def figures(cut: Rows) -> dict[str, np.ndarray]:
            features = self.encoded[cut["start"][0] : cut["stop"][0]]
            while True:
                try:
                    return {"figures": np.concatenate(list(parts(features)))}
                except RuntimeError as error:
                    if not should_reduce_batch_size(error) or self.max_batch_length <= 1:
                        raise
                # Not by find_executable_batch_size: it collects garbage at every call, longer than a batch takes.
                self.max_batch_length //= 2
                clear_device_cache(garbage_collection=True)

        def parts(features: Rows) -> Iterator[np.ndarray]:
            for rows in batches(self.adapter.lengths(features), self.max_batch_length):
                part = {key: values[rows] for key, values in features.items()}
                yield work(to_device(self.adapter.collate(part), self.adapter.model))

        return figures

    def _gather(self, local: np.ndarray) -> np.ndarray:
        """Collect every process's share: `[processes, rows of the longest share, columns]`, NaN beyond a share."""
        if self.state.num_processes == 1:
            return local[None]
        padded = pad_across_processes(torch.from_numpy(local).to(self.state.device), pad_index=np.nan)
        return gather(padded).cpu().numpy().reshape(self.state.num_processes, -1, local.shape[1])


def encode(
    adapter: Adapter,
    rows: Dataset,
    role: str,
    cache_dir: Path | None = None,
    *,
    first_row: int = 0,
    drop_unreadable: bool = False,
) -> Dataset:
    """Encode rows once, checking every one of them.

    Args:
        adapter (`Adapter`): Encodes.
        rows (`datasets.Dataset`): Queries or candidates.
        role (`str`): `"queries"` or `"candidates"`, for messages.
        cache_dir (`Path`, *optional*): Defaults to [`default_cache_dir`].
        first_row (`int`, defaults to 0): Number of the first row, for messages: of a chunk of a stream, its place.
        drop_unreadable (`bool`, defaults to `False`): Leave out, without a word, rows of which something can't be read
            where the adapter would go on without them: what is left is no longer row for row.

    Returns:
        `datasets.Dataset`: The features of `Adapter.encode`, row for row.

    Raises:
        ValueError: If there are no rows, a column is missing, or a row has nothing to predict.
    """
    check_dataset(rows, role)
    if role == "queries":
        adapter = query_adapter(adapter, rows.column_names)
    columns = adapter.columns_in(rows.column_names)
    check_rows(rows, columns, role)
    state = process_state()
    name = fingerprint(rows._fingerprint, adapter.cache_key)
    with state.main_process_first(), progress_bars(state.is_main_process):
        encoded = adapter.prepare(rows.select_columns(list(columns))).map(
            adapter.encode,
            batched=True,
            remove_columns=list(columns),
            cache_file_name=_cache_file(cache_dir or default_cache_dir(), "encoded", name),
            new_fingerprint=name,
            desc=f"encoding {role}",
        )
    if "unreadable" in encoded.column_names:
        reasons = encoded["unreadable"][:]
        encoded = encoded.remove_columns("unreadable")
        if drop_unreadable and adapter.skips_unreadable and any(reasons):
            encoded = encoded.select(np.flatnonzero([not reason for reason in reasons]))
        else:
            check_readable(reasons, role, first_row, adapter.skips_unreadable)
    check_terms(np.array(encoded["terms"]), columns[-1], role, first_row)
    if (lost := _lost(encoded["truncated"][:])) and state.is_main_process:
        warnings.warn(f"Of {len(rows)} {role}, longer than the model reads, {lost}.", stacklevel=3)
    return encoded.remove_columns("truncated")


def _lost(truncated: list[bool | str]) -> str:
    """Say how many rows lost their beginnings, and how many their ends; nothing where all are whole."""
    ends = ["end" if cut is True else cut or "" for cut in truncated]
    counts = {name: sum(name in cut for cut in ends) for name in ("beginning", "end")}
    return " and ".join(
        f"{count} {'loses its' if count == 1 else 'lose their'} {name}{'' if count == 1 else 's'}"
        for name, count in counts.items()
        if count
    )


def check_readable(reasons: list[str], role: str, first_row: int, go_on: bool) -> None:
    """Name the rows that can't be read, those with a reason: in a warning, or else in a `ValueError`."""
    rows = np.flatnonzero([bool(reason) for reason in reasons])
    if not len(rows):
        return
    shown = "; ".join(f"row {row + first_row}: {reasons[row]}" for row in rows[:REASONS])
    told = f"Of {role} {listed(rows + first_row)} can't be read ({shown}{'; ...' if len(rows) > REASONS else ''})."
    if not go_on:
        raise ValueError(f"{told} Mend the rows or drop them.")
    if process_state().is_main_process:
        warnings.warn(f"{told} A row of which nothing can be read has no score.", stacklevel=4)


def check_terms(terms: np.ndarray, column: str, role: str, first_row: int = 0) -> None:
    """Raise a `ValueError` that names the rows in which there is nothing to predict."""
    empty = np.flatnonzero(terms == 0) + first_row
    if len(empty):
        raise ValueError(
            f"Nothing to predict in {role} {listed(empty)}: `{column}` is empty. Fill it or drop the rows."
        )


def batches(lengths: np.ndarray, max_batch_length: int) -> Iterator[slice]:
    """Cut sorted rows into batches whose padded size, rows x longest, stays within a limit.

    Args:
        lengths (`np.ndarray`): `[rows, axes]`, from `Adapter.lengths`.
        max_batch_length (`int`): The limit; a single row may exceed it.
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


def _cache_file(cache_dir: Path, kind: str, name: str) -> str | None:
    """Name the file that `datasets.map` writes, atomically, and reads if it is there."""
    if not is_caching_enabled():
        return None
    folder = cache_dir / kind
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{name}.arrow")
