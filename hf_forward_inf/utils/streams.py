"""What a stream of rows is recognised by."""

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from datasets import Dataset, IterableDataset

FIRST_ROWS = 16
"""Rows by which a stream is recognised when a run resumes."""


def identity(stream: IterableDataset) -> list[Any]:
    """Return what tells a stream from another one: its columns, shards, first rows, and what it reads from."""
    first = next(stream.with_format("arrow").iter(batch_size=FIRST_ROWS), None)  # a copy: the stream stays where it is
    sources = list(_sources(getattr(stream, "_ex_iterable", None)))
    return [str(stream.features), stream.num_shards, None if first is None else first.to_pylist(), sources]


def _sources(part: Any) -> Iterator[Any]:
    """Yield size and time of the local files that a stream reads, addresses of others, fingerprints of datasets."""
    for inner in [getattr(part, "ex_iterable", None), *(getattr(part, "ex_iterables", None) or [])]:
        if inner is not None:
            yield from _sources(inner)
    for values in (getattr(part, "kwargs", None) or {}).values():
        for value in values if isinstance(values, list) else []:
            if isinstance(value, Dataset):
                yield value._fingerprint
            elif isinstance(value, str):
                yield _stamp(value)


def _stamp(path: str) -> Any:
    with suppress(OSError, ValueError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    return path
