"""One cached pass over all candidates: encoded once, sorted, batched and distributed over the processes."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, reduce
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset, is_caching_enabled
from datasets.utils import tqdm

from hf_forward_inf.adapters.base import Adapter, Batch, Rows
from hf_forward_inf.adapters.contrast import query_adapter
from hf_forward_inf.passes.row_store import RowStore
from hf_forward_inf.utils.cache import mark_used
from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model, foreign_hooks
from hf_forward_inf.utils.models import to_device
from hf_forward_inf.utils.processes import process_state, progress_bars
from hf_forward_inf.utils.storage import default_cache_dir, written
from hf_forward_inf.utils.validation import check_dataset, check_rows, listed

MAX_BATCH_LENGTH = 4096
"""Default maximum of padded tokens in a batch; halved when memory runs out."""
REASONS = 5
"""Maximum number of unreadable rows for which a message gives the reason."""


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
        self.terms = np.array(encoded["terms"], dtype=np.float32)
        lengths = adapter.lengths(encoded.with_format(None))
        if not adapter.can_batch(encoded.with_format(None), lengths):
            self.max_batch_length = 1
        # Longest first: if memory runs out, it does so at the start. Ties stay in order, so that runs agree.
        self.order = np.lexsort(-lengths.T[::-1])
        self.encoded = encoded.select(self.order)
        self.cuts = list(batches(lengths[self.order], self.max_batch_length))
        self.fingerprint = fingerprint(fingerprint_of_model(adapter.model), adapter.cache_key, encoded._fingerprint)
        hooked = foreign_hooks(adapter.model)
        self.cached = not hooked
        if hooked and self.state.is_main_process:
            warnings.warn(
                f"{hooked[0]} has a forward hook of your own{f' ({len(hooked)} modules have)' if hooked[1:] else ''}: "
                "what it does is not known, so losses are not cached.",
                stacklevel=2,
            )

    def run(self, work: Callable[[Batch], np.ndarray], columns: int, key: str, title: str) -> np.ndarray:
        """Run one cached pass over this process's share of the rows that are not stored, and gather all values.

        Args:
            work (`Callable`): Computes float32 values, `[rows, columns]`, from a batch on the model's device.
            columns (`int`): Number of values for each candidate.
            key (`str`): Identifies everything that the values depend on besides weights, candidates and adapter.
            title (`str`): Title of the progress bar.

        Returns:
            `np.ndarray`: float32 `[columns, candidates]`.
        """
        store = RowStore(self._folder(key), len(self.order), columns)
        values, stored = self._stored(store)
        # Processes share whole batches: shapes, and so every bit of a loss, are those of a single process.
        missing = [cut for cut in self.cuts if not stored[self.order[cut]].all()]
        share = missing[self.state.process_index :: self.state.num_processes]
        main = self.state.is_main_process
        with store.writing() as add, progress_bars(main), tqdm(share, f"{title}, batches", disable=not share) as bar:
            for cut in bar:
                places = np.arange(cut.start, cut.stop)[~stored[self.order[cut]]]
                rows = self.order[places]
                values[rows] = self._values(work, self.encoded[places])
                add(rows, values[rows])
        return self._gathered(values).T

    def _folder(self, key: str) -> Path | None:
        """Return the folder of a pass's values; `None` where nothing is cached."""
        cached = self.cached and is_caching_enabled()
        return self.cache_dir / "passes" / self.fingerprint / fingerprint(key) if cached else None

    def _stored(self, store: RowStore) -> tuple[np.ndarray, np.ndarray]:
        """Return the values that are stored, on the main process alone, and which rows they are, on all."""
        if self.state.num_processes == 1:
            return store.load()
        found = store.load() if self.state.is_main_process else RowStore(None, *store.shape).load()
        return found[0], broadcast_object_list([found[1]])[0]

    def _values(self, work: Callable[[Batch], np.ndarray], features: Rows) -> np.ndarray:
        """Compute the values of some rows, `[rows, columns]`, in halved batches when memory runs out."""

        def parts() -> Iterator[np.ndarray]:
            for rows in batches(self.adapter.lengths(features), self.max_batch_length):
                part = {key: values[rows] for key, values in features.items()}
                yield work(to_device(self.adapter.collate(part), self.adapter.model))

        while True:
            try:
                return np.concatenate(list(parts()))
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or self.max_batch_length <= 1:
                    raise
            # Not find_executable_batch_size: it collects garbage at every call, which takes longer than a batch.
            self.max_batch_length //= 2
            clear_device_cache(garbage_collection=True)

    def _gathered(self, values: np.ndarray) -> np.ndarray:
        """Add up what the processes have, `[rows, columns]`: each row is 0 in all of them but one."""
        if self.state.num_processes == 1:
            return values
        bits = torch.from_numpy(values).view(torch.int32).to(self.state.device)  # floats would lose the sign of -0
        return reduce(bits, "sum").cpu().view(torch.float32).numpy()


def encode(
    adapter: Adapter,
    rows: Dataset,
    role: str,
    cache_dir: Path | None = None,
    *,
    first_row: int = 0,
    drop_unreadable: bool = False,
) -> Dataset:
    """Check and encode all rows, cached.

    Args:
        adapter (`Adapter`): Encodes the rows.
        rows (`datasets.Dataset`): Queries or candidates.
        role (`str`): `"queries"` or `"candidates"`, for messages.
        cache_dir (`Path`, *optional*): Defaults to [`default_cache_dir`].
        first_row (`int`, defaults to 0): The number that messages give the first row, such as the row number in the
            stream of a chunk's first row.
        drop_unreadable (`bool`, defaults to `False`): Leave out unreadable rows without a warning, where the adapter
            skips such rows. The result then has fewer rows.

    Returns:
        `datasets.Dataset`: The features of `Adapter.encode`, one row for each of `rows`.

    Raises:
        ValueError: If there are no rows, a column is missing, a row has nothing to predict, or one can't be read and
            the adapter does not skip such rows.
    """
    check_dataset(rows, role)
    if role == "queries":
        adapter = query_adapter(adapter, rows.column_names)
    columns = adapter.columns_in(rows.column_names)
    check_rows(rows, columns, role)
    state = process_state()
    name = fingerprint(rows._fingerprint, adapter.cache_key)
    with state.main_process_first(), progress_bars(state.is_main_process):
        encoded = _mapped(
            adapter.prepare(rows.select_columns(list(columns))),
            (cache_dir or default_cache_dir()) / "encoded" / f"{name}.arrow",
            function=adapter.encode,
            batched=True,
            remove_columns=list(columns),
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
        warnings.warn(
            f"{role.capitalize()} longer than the model's maximum length are truncated: of {len(rows)} rows, {lost}.",
            stacklevel=3,
        )
    return encoded.remove_columns("truncated")


def _lost(truncated: list[bool | str]) -> str:
    """Return, in words, how many rows lose their beginnings and how many their ends; "" if none is truncated."""
    ends = ["end" if cut is True else cut or "" for cut in truncated]
    counts = {name: sum(name in cut for cut in ends) for name in ("beginning", "end")}
    return " and ".join(
        f"{count} {'loses its' if count == 1 else 'lose their'} {name}{'' if count == 1 else 's'}"
        for name, count in counts.items()
        if count
    )


def check_readable(reasons: list[str], role: str, first_row: int, skips_unreadable: bool) -> None:
    """Warn of the rows that can't be read, or raise a `ValueError` if the adapter does not skip such rows.

    Args:
        reasons (`list[str]`): Why each row can't be read; empty for readable rows.
        role (`str`): As in [`encode`].
        first_row (`int`): As in [`encode`].
        skips_unreadable (`bool`): As in [`Adapter`].
    """
    rows = np.flatnonzero([bool(reason) for reason in reasons])
    if not len(rows):
        return
    shown = "; ".join(f"row {row + first_row}: {reasons[row]}" for row in rows[:REASONS])
    more = "; ..." if len(rows) > REASONS else ""
    message = f"{role.capitalize()} {listed(rows + first_row)} can't be read ({shown}{more})."
    if not skips_unreadable:
        raise ValueError(f"{message} Fix the rows or drop them.")
    if process_state().is_main_process:
        warnings.warn(f"{message} A row without anything readable has no score.", stacklevel=4)


def check_terms(terms: np.ndarray, column: str, role: str, first_row: int = 0) -> None:
    """Raise a `ValueError` that names the rows that have nothing to predict."""
    empty = np.flatnonzero(terms == 0) + first_row
    if len(empty):
        raise ValueError(
            f"Nothing to predict in {role} {listed(empty)}: `{column}` is empty. Fill it or drop the rows."
        )


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


def _mapped(rows: Dataset, file: Path, **options: Any) -> Dataset:
    """Return `rows.map(**options)`, cached in a file that is there whole or not at all."""
    if not is_caching_enabled():
        return rows.map(**options)
    if not file.exists():
        with written(file) as part:
            rows.map(**options, cache_file_name=str(part))
    mark_used(file)
    return rows.map(**options, cache_file_name=str(file))
