"""Rows checked and encoded, once for all runs; a few random rows of what is cached are encoded again and compared."""

import os
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, is_caching_enabled

from hf_forward_inf.adapters.base import Adapter, Rows
from hf_forward_inf.adapters.contrast import query_adapter
from hf_forward_inf.passes.freshness import agree, drawn_rows, is_first_use, tolerance_of
from hf_forward_inf.utils.cache import mark_used
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.processes import process_state, progress_bars
from hf_forward_inf.utils.progress import progress
from hf_forward_inf.utils.rows import as_stored
from hf_forward_inf.utils.storage import default_cache_dir, written
from hf_forward_inf.utils.validation import check_dataset, check_rows, listed

REASONS = 5
"""Maximum number of unreadable rows for which a message gives the reason."""
PATH = 4096
"""Longest text that may be a path."""


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

    The cache key is that of the rows and the adapter, with size and time of every file that a row names.

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
    rows = as_stored(rows, role)
    if role == "queries":
        adapter = query_adapter(adapter, rows.column_names)
    columns = adapter.columns_in(rows.column_names)
    check_rows(rows, columns, role)
    state = process_state()
    read = rows.select_columns(list(columns))
    name = fingerprint(rows._fingerprint, adapter.cache_key, _files(read))
    prepared = adapter.prepare(read)  # may run the model, which all processes of a sharded one do together
    with state.main_process_first():
        encoded = _mapped(
            prepared,
            (cache_dir or default_cache_dir()) / "encoded" / f"{name}.arrow",
            adapter,
            role,
            batched=True,
            remove_columns=list(columns),
            new_fingerprint=name,
        )
    if "unreadable" in encoded.column_names:
        reasons = encoded["unreadable"][:]
        encoded = encoded.remove_columns("unreadable")
        if drop_unreadable and adapter.skips_unreadable and any(reasons):
            encoded = encoded.select(np.flatnonzero([not reason for reason in reasons]))
        else:
            check_readable(reasons, role, first_row, adapter.skips_unreadable)
    check_terms(np.array(encoded["terms"][:]), columns[-1], role, first_row)
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


def _files(rows: Dataset) -> list[tuple[int, int]]:
    """Return size and time of the files that rows name, such as pictures that are stored as paths."""
    table = rows.with_format("arrow")
    if not any(os.path.isfile(path) for column in table[:1].columns for path in _paths(column) if len(path) < PATH):
        return []
    stamps = []
    for part in table.iter(batch_size=1000):
        for path in chain.from_iterable(map(_paths, part.columns)):
            try:
                status = os.stat(path)
            except (OSError, ValueError):
                continue
            stamps.append((status.st_size, status.st_mtime_ns))
    return stamps


def _paths(values: pa.Array | pa.ChunkedArray) -> Iterator[str]:
    """Yield the strings of a column, also within lists; of files (`bytes`, `path`) paths where there are no bytes."""
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _paths(pc.list_flatten(values))
    elif pa.types.is_struct(kind) and {field.name for field in kind} >= {"bytes", "path"}:
        inside = pc.is_null(pc.struct_field(values, "bytes"))
        yield from _paths(pc.struct_field(values, "path").filter(inside))
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        yield from (path for path in values.to_pylist() if path)


def _encoded(rows: Dataset, adapter: Adapter, role: str, **options: Any) -> Dataset:
    """Return `rows.map(adapter.encode, **options)`, and show how many rows are done."""
    with progress(f"encoding {role}", len(rows), "rows") as advance, progress_bars(False):

        def encode(some: Rows) -> Rows:
            features = adapter.encode(some)
            advance(len(features["terms"]))
            return features

        return rows.map(encode, **options)


def _mapped(rows: Dataset, file: Path, adapter: Adapter, role: str, **options: Any) -> Dataset:
    """Return [`_encoded`], cached in a file that is there whole or not at all."""
    if not is_caching_enabled():
        return _encoded(rows, adapter, role, **options)
    cached = file.exists()
    if not cached:
        with written(file) as part:
            _encoded(rows, adapter, role, **options, cache_file_name=str(part))
    mark_used(file)
    encoded = rows.map(adapter.encode, **options, cache_file_name=str(file))
    if not is_first_use(adapter, file.stem) or not cached or _is_current(encoded, rows, adapter):
        return encoded
    warnings.warn(
        f"Encoding {role}: what is cached is not what rows are encoded as now (a file, a tokenizer or a transform "
        "has changed), so all rows are encoded again.",
        stacklevel=3,
    )
    file.unlink(missing_ok=True)
    return _mapped(rows, file, adapter, role, **options)


def _is_current(encoded: Dataset, rows: Dataset, adapter: Adapter) -> bool:
    """Encode a few random rows again, and compare."""
    places = drawn_rows(np.arange(len(rows)))
    fresh = adapter.encode(rows[places])
    if set(fresh) != set(encoded.column_names):
        return False
    try:
        again = Dataset.from_dict(fresh, features=encoded.features)
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError):
        return False
    before, now = encoded.with_format("arrow")[places], again.with_format("arrow")[:]
    tolerance = tolerance_of(adapter.model)
    return all(_same(before[name], now[name], tolerance) for name in encoded.column_names)


def _same(before: pa.ChunkedArray, now: pa.ChunkedArray, tolerance: float) -> bool:
    if before.equals(now):
        return True
    while pa.types.is_list(before.type) or pa.types.is_large_list(before.type):
        if not pc.list_value_length(before).equals(pc.list_value_length(now)):
            return False
        before, now = pc.list_flatten(before), pc.list_flatten(now)
    if not pa.types.is_floating(before.type):
        return before.equals(now)
    return agree(before.to_numpy(), now.to_numpy(), tolerance)
