"""One cached pass over all candidates: encoded once, sorted, batched and distributed over the processes."""

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
from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model, foreign_hooks
from hf_forward_inf.utils.models import to_device
from hf_forward_inf.utils.processes import process_state, progress_bars
from hf_forward_inf.utils.storage import default_cache_dir
from hf_forward_inf.utils.validation import check_dataset, check_rows, listed

MAX_BATCH_LENGTH = 4096
"""Default maximum of padded tokens in a batch; halved when memory runs out."""
REASONS = 5
"""Maximum number of unreadable rows for which a message gives the reason."""


class CandidatePass:
    """Runs a function over every candidate, batch by batch, and returns its values in the candidates' order.

    Candidates are encoded once, sorted by length to save padding, and distributed over the processes of
    `accelerate launch`. Each pass is one `datasets.map`, cached under a fingerprint of weights, encoded candidates,
    settings and the function's own key: an interrupted run resumes with the first unfinished pass.

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
        # Processes share whole batches: shapes, and so every bit of a loss, are those of a single process.
        cuts = list(batches(lengths[self.order], self.max_batch_length))
        self.shares = [cuts[process :: self.state.num_processes] for process in range(self.state.num_processes)]
        self.weights = fingerprint_of_model(adapter.model)
        hooked = foreign_hooks(adapter.model)
        self.cached = not hooked
        if hooked and self.state.is_main_process:
            warnings.warn(
                f"{hooked[0]} has a forward hook of your own{f' ({len(hooked)} modules have)' if hooked[1:] else ''}: "
                "what it does is not known, so losses are not cached.",
                stacklevel=2,
            )

    def run(self, work: Callable[[Batch], np.ndarray], columns: int, key: str, title: str) -> np.ndarray:
        """Run one cached pass over this process's share, and gather the values of all processes.

        Args:
            work (`Callable`): Computes float32 values, `[rows, columns]`, from a batch on the model's device.
            columns (`int`): Number of values for each candidate.
            key (`str`): Identifies everything that the values depend on besides weights, candidates and adapter.
            title (`str`): Title of the progress bar.

        Returns:
            `np.ndarray`: float32 `[columns, candidates]`.
        """
        cuts = self.shares[self.state.process_index]
        # A single process computes all rows in one order, however they are cut; a share's rows depend on the cuts.
        own = [(c.start, c.stop) for c in cuts] if self.state.num_processes > 1 else None
        name = fingerprint(self.weights, self.adapter.cache_key, self.encoded._fingerprint, key, own)
        local = np.empty((0, columns), dtype=np.float32)
        if cuts:
            with progress_bars(self.state.is_main_process):
                mapped = Dataset.from_dict({"start": [c.start for c in cuts], "stop": [c.stop for c in cuts]}).map(
                    self._step(work),
                    batched=True,
                    batch_size=1,
                    remove_columns=["start", "stop"],
                    features=Features({"figures": List(Value("float32"), length=columns)}),
                    cache_file_name=_cache_file(self.cache_dir, "passes", name) if self.cached else None,
                    new_fingerprint=name,
                    desc=f"{title}, batches",
                )
            local = np.asarray(mapped.with_format("numpy")["figures"][:], dtype=np.float32).reshape(-1, columns)
        figures = np.empty((columns, len(self.order)), dtype=np.float32)
        for share, part in zip(self.shares, self._gather(local), strict=True):
            if share:
                indices = np.concatenate([self.order[cut] for cut in share])
                figures[:, indices] = part[: len(indices)].T
        return figures

    def _step(self, work: Callable[[Batch], np.ndarray]) -> Any:
        """Return the function that `datasets.map` calls; it halves its batches when memory runs out."""

        def figures(cut: Rows) -> dict[str, np.ndarray]:
            features = self.encoded[cut["start"][0] : cut["stop"][0]]
            while True:
                try:
                    return {"figures": np.concatenate(list(parts(features)))}
                except RuntimeError as error:
                    if not should_reduce_batch_size(error) or self.max_batch_length <= 1:
                        raise
                # Not find_executable_batch_size: it collects garbage at every call, which takes longer than a batch.
                self.max_batch_length //= 2
                clear_device_cache(garbage_collection=True)

        def parts(features: Rows) -> Iterator[np.ndarray]:
            for rows in batches(self.adapter.lengths(features), self.max_batch_length):
                part = {key: values[rows] for key, values in features.items()}
                yield work(to_device(self.adapter.collate(part), self.adapter.model))

        return figures

    def _gather(self, local: np.ndarray) -> np.ndarray:
        """Gather every process's share, `[processes, rows of the longest share, columns]`; NaN beyond a share."""
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


def _cache_file(cache_dir: Path, kind: str, name: str) -> str | None:
    """Return the cache file that `datasets.map` reads or (atomically) writes; `None` if caching is disabled."""
    if not is_caching_enabled():
        return None
    folder = cache_dir / kind
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{name}.arrow")
